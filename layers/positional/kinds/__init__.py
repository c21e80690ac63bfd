"""The kinds of positional labels, a file each; a class with a string `name` is found by itself."""
