"""How samples become batches: samplers, loaders with workers, and caches of decoded images."""
