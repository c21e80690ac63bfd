"""What goes along with exported weights, and whole programs that run without this toolkit."""
