"""Hard negatives for training: candidates, what is left out and why, the share of false ones, and tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nearfar.lazy import lazy_names

if TYPE_CHECKING:
    from nearfar.mining.candidates import nearest_documents as nearest_documents
    from nearfar.mining.false_negatives import FalseNegatives as FalseNegatives
    from nearfar.mining.false_negatives import measure_false_negatives as measure_false_negatives
    from nearfar.mining.false_negatives import read_marked as read_marked
    from nearfar.mining.false_negatives import sample_to_mark as sample_to_mark
    from nearfar.mining.mine import Mined as Mined
    from nearfar.mining.mine import mine_negatives as mine_negatives
    from nearfar.mining.on_disk import MinedOnDisk as MinedOnDisk
    from nearfar.mining.on_disk import mine_negatives_on_disk as mine_negatives_on_disk
    from nearfar.mining.tables import FORMATS as FORMATS
    from nearfar.mining.tables import mined_table as mined_table

# Resolved on first use: FAISS costs more to import than a loss costs to compute.
_HOME = {
    "FORMATS": "tables",
    "FalseNegatives": "false_negatives",
    "Mined": "mine",
    "MinedOnDisk": "on_disk",
    "measure_false_negatives": "false_negatives",
    "mine_negatives": "mine",
    "mine_negatives_on_disk": "on_disk",
    "mined_table": "tables",
    "nearest_documents": "candidates",
    "read_marked": "false_negatives",
    "sample_to_mark": "false_negatives",
}
__all__ = list(_HOME)
__getattr__, __dir__ = lazy_names(__name__, _HOME, __all__)
