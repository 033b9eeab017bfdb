"""Runs on disk, read and compared: tables, reports, paired differences with a verdict."""
