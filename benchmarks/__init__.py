"""Benchmarks: each is a module to run, checks its numbers first and writes JSON rows."""
