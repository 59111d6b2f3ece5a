"""Every benchmark that a model can be scored on, by name (see `registry`)."""

# Each module enters its tasks into registry.TASKS: from . import MODULE
from . import code, mt_bench  # noqa: F401
