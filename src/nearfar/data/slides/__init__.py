"""Slides with spots: readers of their layouts, WebDataset shards of spots, and spots as items."""
