"""Optax on every stage, and what must cross stages: the norm, and tied parameters."""
