"""Molecules: reading SMILES, fingerprints and graphs of them, and the networks over both."""
