"""`corda demo`."""
