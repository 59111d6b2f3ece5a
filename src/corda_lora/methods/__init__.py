"""Every method that can be compared, by name."""
