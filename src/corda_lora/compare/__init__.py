"""Methods × learning rates × seeds, and what follows from the results."""
