"""One update: optimizer, learning rate, precision, and the state that is saved."""
