"""Timings of the library against what a user would write by hand."""
