"""Classifiers by name: Vision Transformers, Swin, So-ViT, and timm's models."""
