"""Every stage as a command: `corda VERB`."""

from .command import main

__all__ = ["main"]
