"""Rows into the program: tables with counted rejections, splits that are checked, a cache by content."""
