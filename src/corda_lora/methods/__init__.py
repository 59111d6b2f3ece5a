"""Every method that can be compared, by name (see `registry`)."""

from . import baselines, corda, quantized, rivals  # noqa: F401 (each enters its methods into registry.METHODS)
