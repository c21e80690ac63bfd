"""What a model is worth: accuracies, nearest neighbours, spectra."""
