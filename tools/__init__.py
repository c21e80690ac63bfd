"""What the doors checkpoints.py and visualize.py do: models and their files, looked at, converted, drawn."""
