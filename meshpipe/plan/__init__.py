"""Schedules as plain data: made, checked, simulated and lowered. Imports no JAX."""
