"""Runs a lowered plan: the executor and the transfers between submeshes and processes."""
