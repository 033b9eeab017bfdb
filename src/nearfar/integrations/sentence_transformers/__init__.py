"""sentence-transformers: losses, batch samplers, an evaluator and a callback for its ``SentenceTransformerTrainer``."""

from __future__ import annotations

from nearfar.errors import NearfarError

try:
    import sentence_transformers.base.sampler  # noqa: F401  # where version 6 has it
except ImportError as error:
    raise NearfarError(
        "nearfar.integrations.sentence_transformers needs sentence-transformers, version 6 or later: "
        "pip install 'nearfar[sentence-transformers]'"
    ) from error

from nearfar.integrations.sentence_transformers.batches import HardBatches, PartitionBatches, UniqueBatches
from nearfar.integrations.sentence_transformers.losses import InfoNCELoss, SigLipLoss, SupConLoss
from nearfar.integrations.sentence_transformers.watching import RetrievalEvaluator, Watch

__all__ = [
    "HardBatches",
    "InfoNCELoss",
    "PartitionBatches",
    "RetrievalEvaluator",
    "SigLipLoss",
    "SupConLoss",
    "UniqueBatches",
    "Watch",
]
