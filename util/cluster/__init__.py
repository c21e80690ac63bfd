"""SLURM: submission, sweeps, follow-ups, status, and the check of a cluster."""
