"""The loop, the run folder, exact resume; what a system must offer stands in ``system.py``."""
