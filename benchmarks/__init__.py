"""Benchmarks: `python -m benchmarks.PACKAGE [VERB] [options]` checks its numbers, then writes rows.

The packages are `detector`, `attention`, `assignment`, `loader` and `codegen`.
"""
