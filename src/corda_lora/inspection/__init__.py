"""What contexts say of a model: spectra, covariances, what is lost when components are discarded."""
