"""Optax on every stage, and what crosses stages: the global norm and tied parameters."""
