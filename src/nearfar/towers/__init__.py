"""Towers: each reads one kind of view (texts, pictures, numbers, …) and builds the module that is trained on it."""

from nearfar.towers.base import Backbone, Tower
from nearfar.towers.build import (
    build_tower,
    encoder_options,
    guess_tower,
    load_tower,
    load_towers,
    register_tower,
    save_towers,
    tower_names,
)

__all__ = [
    "Backbone",
    "Tower",
    "build_tower",
    "encoder_options",
    "guess_tower",
    "load_tower",
    "load_towers",
    "register_tower",
    "save_towers",
    "tower_names",
]
