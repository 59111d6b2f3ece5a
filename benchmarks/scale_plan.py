"""The tables of docs/scale.md: what Llama-3's 70B and 405B take on 8 and on 64 H100s, by the plan alone. And a step of
a 7B model on one GPU, which was measured.

    python benchmarks/scale_plan.py

The models are built on the meta device from their published shapes. Nothing is measured here.
"""

import tempfile

from torch import nn
from transformers import LlamaConfig

from corda_lora.config import CordaConfig, ModelConfig
from corda_lora.preprocess.machine import H100
from corda_lora.preprocess.plan import Tokens, planned_model, shapes_of, size_text
from corda_lora.report.terminal import time_text
from corda_lora.training.plan import SharedPlan, SharedStage, shared_plan

# Grattafiori et al., The Llama 3 Herd of Models, arXiv 2407.21783, table 3.
SIZES = {
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
}
COMMON = {
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "architectures": ["LlamaForCausalLM"],
}
CONFIGS = {"`corda`": CordaConfig(mode="kpm", r=128), "`corda++`": CordaConfig(mode="kpm", preset="corda++", r=128)}
SAMPLES, LENGTH, STEP = 256, 512, 4096
BATCH = 2048  # tokens of the context a forward: so there are 64 batches in a round, one for each of 64 GPUs
# That of benchmarks/results/keep_cost_train_2026-11-29_h200.md
SMALL = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000}


def empty_llama(sizes: dict[str, int]) -> nn.Module:
    """The model on the meta device, from its config.json, as `corda plan` makes it."""
    settings = LlamaConfig(**COMMON | sizes)
    with tempfile.TemporaryDirectory() as folder:
        settings.save_pretrained(folder)
        return planned_model(ModelConfig(folder))


def main() -> None:
    for size in SIZES:
        model = empty_llama(SIZES[size])
        shapes = {name: shapes_of(model, config) for name, config in CONFIGS.items()}
        for gpus, hosts in ((8, 1), (64, 8)):
            print(f"\n| {size}, {gpus} GPUs | time | a GPU | a host | sent by a GPU |\n|---|---:|---:|---:|---:|")
            for name, config in CONFIGS.items():
                rounds = config.rounds or 1
                total = rounds * SAMPLES * LENGTH
                tokens = Tokens(total, BATCH, total * LENGTH, total // BATCH)
                plan = shared_plan(shapes[name], config, tokens, H100, gpus, hosts, step_tokens=STEP)
                for stage in plan.preparation:
                    row(f"{name}: {stage.name}", stage, plan)
            for stage in plan.steps:
                row(f"a step, {stage.name}", stage, plan)
    model, config = empty_llama(SMALL | {"num_attention_heads": 32, "num_key_value_heads": 32}), CONFIGS["`corda`"]
    step = shared_plan(shapes_of(model, config), config, Tokens(), H100, 1, step_tokens=STEP).steps[0]
    print(f"\n7B, one GPU: a step of {STEP} tokens takes {step.seconds:.2f} s, {step.accelerator / 2**30:.1f} GiB")


def row(name: str, stage: SharedStage, plan: SharedPlan) -> None:
    sizes = [size_text(x) if x and x == x else "" for x in (stage.accelerator, stage.host, stage.traffic)]
    if not plan.fits(stage):
        sizes[0] += " (too much)"
    print(f"| {name} | {time_text(stage.seconds)} | {' | '.join(sizes)} |")


if __name__ == "__main__":
    main()
