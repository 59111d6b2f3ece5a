"""The mathematics: pure functions on tensors, which know nothing of models."""
