"""Every benchmark that a model can be scored on, by name (see `registry`)."""

from . import code, glue, harness, mt_bench  # noqa: F401 (each module enters its tasks into registry.TASKS)
