"""A small detector trained on a few thousand boxes, fast on a CPU."""
