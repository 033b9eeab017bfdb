"""Who goes into a batch: neighbour lists, batch samplers, and how hard their batches really are.

Every sampler yields lists of positions, has an exact ``len``, its own generator and a state that resumes in
mid-epoch; give it to a ``DataLoader`` as ``batch_sampler``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nearfar.lazy import lazy_names

if TYPE_CHECKING:
    from nearfar.batching.balanced import BalancedBatchSampler as BalancedBatchSampler
    from nearfar.batching.base import BatchSampler as BatchSampler
    from nearfar.batching.disk_neighbors import nearest_neighbors_on_disk as nearest_neighbors_on_disk
    from nearfar.batching.hard_negative import HardNegativeSampler as HardNegativeSampler
    from nearfar.batching.hardness import HardnessReport as HardnessReport
    from nearfar.batching.hardness import SimilarityCheck as SimilarityCheck
    from nearfar.batching.hardness import check_harder_than_random as check_harder_than_random
    from nearfar.batching.hardness import in_batch_similarity as in_batch_similarity
    from nearfar.batching.hardness import measure_hardness as measure_hardness
    from nearfar.batching.mapped_neighbors import MappedNeighbors as MappedNeighbors
    from nearfar.batching.neighbors import Neighbors as Neighbors
    from nearfar.batching.neighbors import nearest_neighbors as nearest_neighbors
    from nearfar.batching.partition import PartitionBatchSampler as PartitionBatchSampler
    from nearfar.batching.plan import Layout as Layout
    from nearfar.batching.plan import Plan as Plan
    from nearfar.batching.random import LengthBatchSampler as LengthBatchSampler
    from nearfar.batching.random import RandomBatchSampler as RandomBatchSampler
    from nearfar.batching.spatial import SpatialBatchSampler as SpatialBatchSampler
    from nearfar.batching.spatial import positions_in_batch as positions_in_batch
    from nearfar.batching.spatial import weight_in_batch as weight_in_batch
    from nearfar.batching.stream import StreamBatches as StreamBatches
    from nearfar.batching.verify import SamplerVerdict as SamplerVerdict
    from nearfar.batching.verify import verify_sampler as verify_sampler

# Resolved on first use: numba and FAISS cost more to import than a loss costs to compute.
_HOME = {
    "BalancedBatchSampler": "balanced",
    "BatchSampler": "base",
    "HardNegativeSampler": "hard_negative",
    "HardnessReport": "hardness",
    "Layout": "plan",
    "LengthBatchSampler": "random",
    "MappedNeighbors": "mapped_neighbors",
    "Neighbors": "neighbors",
    "PartitionBatchSampler": "partition",
    "Plan": "plan",
    "RandomBatchSampler": "random",
    "SamplerVerdict": "verify",
    "SimilarityCheck": "hardness",
    "SpatialBatchSampler": "spatial",
    "StreamBatches": "stream",
    "check_harder_than_random": "hardness",
    "in_batch_similarity": "hardness",
    "measure_hardness": "hardness",
    "nearest_neighbors": "neighbors",
    "nearest_neighbors_on_disk": "disk_neighbors",
    "positions_in_batch": "spatial",
    "verify_sampler": "verify",
    "weight_in_batch": "spatial",
}
__all__ = list(_HOME)
__getattr__, __dir__ = lazy_names(__name__, _HOME, __all__)
