"""The learning rate of a training that gives none. It follows the split of the adapter."""

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
    "residual": {"kpm": 1e-3, "ipm": 5e-4},  # not swept: those of `balanced`, as folded factors are
}
LORA_RATE = 3e-3


def rate_of(split: str, mode: str) -> float:
    """The learning rate to start with, in a split and a mode."""
    return RATES[split][mode]
