"""Checkpoint files: reading, writing, and fitting their weights to a model."""
