"""What there is to see in a model and in an adapter: spectra, covariances, what truncation loses, what moved."""
