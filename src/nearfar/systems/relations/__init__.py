"""Spatial relations: two views of a pair of objects, from boxes and from pixels."""
