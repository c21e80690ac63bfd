"""Evaluation of models: accuracy, nearest neighbours, effective rank."""
