"""The learning rate of a training that gives none. It follows the split of the adapter."""

import peft
from torch import nn

from ..adapters.held import marks_of
from ..config import CordaError

# By split, and by mode. Of the rates swept, the one below the rate with the lowest held-out loss: SmolLM2-135M, rank
# 32, 150 steps of 32 samples, three seeds. (benchmarks/results: keep_and_learn_2026-11-28_h200 for kpm and LoRA,
# learn_fast_2026-11-28_h200 for ipm, keep_questions_2026-11-29_h200 for anchored with the penalty, one seed.
# docs/training.md has the table, and why it is not the best rate itself.)
# `anchored` in ipm and `seeded` in kpm were not swept: their rates are those of the other mode.
RATES = {
    "anchored": {"kpm": 1e-2, "ipm": 5e-3},
    "paper": {"kpm": 1e-4, "ipm": 2e-4},
    "balanced": {"kpm": 1e-3, "ipm": 5e-4},
    "seeded": {"kpm": 3e-3, "ipm": 3e-3},
}
LORA_RATE = 3e-3


def default_rate(model: nn.Module) -> tuple[float, str]:
    """The learning rate to start with for the adapter on a model, and whose rate it is in words.

    Raises CordaError if the model has no adapter of PEFT's.
    """
    if not isinstance(model, peft.PeftModel):
        raise CordaError("the model carries no adapter whose learning rate is known: give a learning_rate")
    try:
        marks = marks_of(model)
    except CordaError:  # an adapter that is not CorDA's
        return LORA_RATE, "plain LoRA"
    mode = marks.get("mode", "ipm" if marks["split"] == "seeded" else "kpm")
    return RATES[marks["split"]][mode], f"the split {marks['split']} in {mode}"
