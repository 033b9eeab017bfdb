"""Configuration: typed options, the groups one chooses from, composing by Hydra, and the registry of systems."""

from nearfar.config.options import (
    column,
    fraction,
    group,
    option,
    path,
    raw_group,
    read_options,
    section,
    to_dict,
)
from nearfar.config.registry import Registration, options_class, register, systems
from nearfar.config.rules import Choice, Encoding, Names, Number, Rule, Scheduled, Switch, Text
from nearfar.config.training import RunOptions, TrainerOptions

__all__ = [
    "Choice",
    "Encoding",
    "Names",
    "Number",
    "Registration",
    "Rule",
    "RunOptions",
    "Scheduled",
    "Switch",
    "Text",
    "TrainerOptions",
    "column",
    "fraction",
    "group",
    "option",
    "options_class",
    "path",
    "raw_group",
    "read_options",
    "register",
    "section",
    "systems",
    "to_dict",
]
