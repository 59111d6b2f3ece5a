"""On a GPU: the cost of a model that stays on the CPU, and the time of a block with rounds.

    python benchmarks/speed_overlap.py

Blocks of LLaMA-2-7B's shape, random bfloat16 weights; about a minute. Medians of three runs, after one to warm up.
"""

import time
import warnings
from collections.abc import Callable

import record
import torch
import transformers
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig as PeftCordaConfig

from corda_lora import CordaConfig
from corda_lora.peft import preprocess_corda
from corda_lora.preprocess.pipeline import preprocess

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    options = record.parser(__doc__).parse_args()
    warnings.simplefilter("ignore")
    rows = {}
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

            rows[f"drop-in, {mode}, model on {home}"] = measure(run, 4)
    model = build(1)
    config = CordaConfig(preset="corda++", r=128, rounds=4)
    rows["corda++, 4 rounds"] = measure(lambda: preprocess(model, config, batches, progress=False), 1)
    lines = ["| run | seconds | a block | peak GPU memory (GiB) |", "|---|---:|---:|---:|"]
    lines += [
        f"| {name} | {row['seconds']:.2f} | {row['seconds_a_block']:.3f} | {row['bytes'] / 2**30:.2f} |"
        for name, row in rows.items()
    ]
    record.write(options, rows, lines)


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


def measure(run: Callable[[], object], blocks: int, repeats: int = 3) -> dict[str, float]:
    """Median seconds of a few runs after one to warm up, and the peak of the GPU's memory."""
    seconds = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        since = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - since)
    median = sorted(seconds[1:])[repeats // 2]
    return {"seconds": median, "seconds_a_block": median / blocks, "bytes": torch.cuda.max_memory_allocated()}


if __name__ == "__main__":
    main()
