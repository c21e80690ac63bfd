"""Experiments that test the claims of the paper: recipes, results and verdicts."""
