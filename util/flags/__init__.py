"""Command lines: the parser, and the groups of flags that the mains share."""
