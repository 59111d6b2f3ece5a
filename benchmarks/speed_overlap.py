"""On a GPU: what it costs that the model is on the CPU, and how long a block with rounds takes.

    python benchmarks/speed_overlap.py

Blocks of LLaMA-2-7B's shape, random bfloat16 weights; about a minute. Prints a table as Markdown.
"""

import time
import warnings
from collections.abc import Callable

import torch
import transformers
from machine import commit, machine
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig as PeftCordaConfig

from corda_lora import CordaConfig
from corda_lora.peft import preprocess_corda
from corda_lora.preprocess.pipeline import preprocess

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    warnings.simplefilter("ignore")
    print(f"{machine()}; torch {torch.__version__}; commit {commit()}\n")
    print("| what | seconds | a block | peak GPU memory |\n|---|---:|---:|---:|")
    ids = torch.randint(3, 8192, (32, 2048), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(8)]
    model = build(4)
    for mode in ("ipm", "kpm"):
        for home in ("cuda", "cpu"):
            model.to(home)

            def run(mode: str = mode) -> None:
                corda = PeftCordaConfig(corda_method=mode)
                config = LoraConfig(r=128, target_modules=LAYERS, init_lora_weights="corda", corda_config=corda)
                here = [{key: value.to(model.device) for key, value in batch.items()} for batch in batches]
                preprocess_corda(model, config, lambda: [model(**batch) for batch in here])

            show(f"drop-in, {mode}, model on {home}", run, 4)
    model = build(1)
    config = CordaConfig(preset="corda++", r=128, rounds=4)
    show("corda++, 4 rounds", lambda: preprocess(model, config, batches, progress=False), 1)


def build(blocks: int) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=blocks,
        vocab_size=8192,
        num_attention_heads=32,
        max_position_embeddings=2048,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def show(what: str, run: Callable[[], object], blocks: int, times: int = 3) -> None:
    """The median of a few runs after one to warm up."""
    seconds = []
    for _ in range(times + 1):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        since = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - since)
    median = sorted(seconds[1:])[times // 2]
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(f"| {what} | {median:.2f} | {median / blocks:.3f} | {peak:.2f} GiB |", flush=True)


if __name__ == "__main__":
    main()
