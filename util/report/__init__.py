"""Runs and predictions as charts, pictures, tables and pages."""
