"""Where images come from: folders, tars, lists of paths, shards."""
