"""Logs of any trainer: which kind a path is, its records, and what its names mean to the doctor."""

from nearfar.doctor.logs.log import Log
from nearfar.doctor.logs.names import Names, map_names
from nearfar.doctor.logs.read import KINDS, find_log, read_log

__all__ = ["KINDS", "Log", "Names", "find_log", "map_names", "read_log"]
