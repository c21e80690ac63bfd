"""A run: its log, its checkpoints, its plan, and what stops it."""
