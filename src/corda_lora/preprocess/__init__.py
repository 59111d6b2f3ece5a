"""From a model and a context to the start of an adapter."""
