"""SLURM: submission, sweeps, follow-up runs, status, and the check of a cluster."""
