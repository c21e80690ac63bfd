"""Semantic segmentation: figures, grading of predictions, and probes of frozen features."""
