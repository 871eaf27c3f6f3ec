"""Data sets of the tasks: rows to tokens, and metrics."""
