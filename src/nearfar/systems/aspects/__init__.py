"""Aspect sentiment: which aspects a review mentions, and how it speaks of each."""
