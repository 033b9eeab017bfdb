"""Reviews with labels of aspects and their polarity: readers of corpora and tables, and their splits."""
