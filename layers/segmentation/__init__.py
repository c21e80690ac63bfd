"""Semantic segmentation: maps of patch features, heads that classify each place, and models of both."""

from layers.segmentation.features import patch_maps
from layers.segmentation.heads import DenseProbe, LinearHead
from layers.segmentation.segmenter import KINDS, Segmenter

__all__ = ["KINDS", "DenseProbe", "LinearHead", "Segmenter", "patch_maps"]
