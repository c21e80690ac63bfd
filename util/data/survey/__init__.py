"""What the images of a data set are: what their headers say, and the range of their values."""
