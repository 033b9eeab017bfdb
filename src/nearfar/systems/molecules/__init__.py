"""Molecule ↔ text retrieval: data, features, model, system, search."""
