"""Molecules with texts: files of structures, SMILES and their scaffolds, pairs and their splits."""
