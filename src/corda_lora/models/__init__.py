"""Loading a model, naming its layers, and running it one block at a time."""
