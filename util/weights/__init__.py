"""Checkpoint files: reading them, writing them, and fitting their weights to a model."""
