"""nearfar in the trainers that people already use: watching a run, losses, batch samplers, evaluators.

Each module belongs to one library, which is imported by it and by nothing else: ``nearfar.integrations.pytorch`` (any
loop).
"""
