"""Why a run stalls: signals in, findings out.

``diagnose`` takes a run folder or a log of any loop; ``RULES`` are what it looks for, as data. Nothing here trains, and
nothing heavy is loaded.
"""

from nearfar.doctor.diagnose import Diagnosis, diagnose
from nearfar.doctor.fields import CONTEXT, FIELDS
from nearfar.doctor.rule import Finding, Rule, Unjudged
from nearfar.doctor.rules import RULES
from nearfar.doctor.run import read_run
from nearfar.doctor.signals import Signals

__all__ = [
    "CONTEXT",
    "FIELDS",
    "RULES",
    "Diagnosis",
    "Finding",
    "Rule",
    "Signals",
    "Unjudged",
    "diagnose",
    "read_run",
]
