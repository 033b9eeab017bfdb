"""Tissue patch ↔ gene expression with spatial neighbours."""
