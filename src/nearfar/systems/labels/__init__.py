"""One view and labels: items of a class come together, judged on items, or on classes, that were never seen."""
