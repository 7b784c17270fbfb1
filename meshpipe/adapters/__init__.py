"""Adapters of low rank on the linear parts of a model (LoRA): grafted, drawn, and merged."""
