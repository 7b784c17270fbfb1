"""The pipeline engine: plans, their lowering, and what runs them; it knows arrays and submeshes, no model or data."""
