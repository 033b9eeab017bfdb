"""What a run imports late, made once for all children of the server they are forked from (``processes``)."""

import hydra.compose  # noqa: F401
import sklearn.feature_extraction.text  # noqa: F401

import nearfar.lab.report  # noqa: F401
import quick_fabric
from nearfar.batching import _kernels
from nearfar.training.fabric import versions_by_metadata

quick_fabric.ask_once()
with versions_by_metadata():
    import lightning_fabric  # noqa: F401

# numba imports much of itself with the first kernel that is called
_kernels.shuffled(4, _kernels.random_state(0, 0))
