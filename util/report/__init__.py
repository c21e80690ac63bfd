"""Runs and predictions as charts, pictures and pages."""
