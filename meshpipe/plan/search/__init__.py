"""Finds a plan for measured costs and a memory limit, as `--schedule auto` does."""
