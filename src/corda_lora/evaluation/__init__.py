"""What is measured of a model: losses, drift, accuracies."""
