"""A run: its log, its checkpoints, its plan, and its guards."""
