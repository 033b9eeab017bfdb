"""nearfar in the trainers that people already use: watching a run, losses, batch samplers, evaluators.

Each module belongs to one library, which is imported by it and by nothing else: ``pytorch`` (any loop),
``sentence_transformers``, ``transformers``, ``lightning``, ``pytorch_metric_learning``, ``open_clip``, ``lightly``,
``mteb``. This package imports none of them.
"""
