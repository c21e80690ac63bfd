"""What the images of a data set are: what their headers tell, and the range of their values."""
