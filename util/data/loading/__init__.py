"""From a data set to batches: the order of samples, workers, collation, caches."""
