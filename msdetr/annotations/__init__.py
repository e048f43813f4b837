"""Annotations of a data set: readers of file formats, checks, and one table that all use."""
