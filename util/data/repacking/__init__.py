"""Shards that load faster than the files that they were made from."""
