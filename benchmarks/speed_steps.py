"""What each step of `corda_lora.peft.preprocess_corda` gains on a GPU: seconds and memory with one of them taken back,
and where the GPU's time goes.

    python benchmarks/speed_steps.py MODEL CONTEXT      64 samples of 2048 tokens, r = 128, the median of three

Model and context may come from make_llama.py (--size 7b --layers 2 --context FILE --words 2060).
"""

import sys
import time
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from corda_lora import covariance, peft
from corda_lora.config import DataConfig, ModelConfig
from corda_lora.context import context_batches, load_samples
from corda_lora.models import load_model, load_tokenizer
from corda_lora.solvers import chosen_components

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    warnings.simplefilter("ignore")
    source = ModelConfig(sys.argv[1])
    tokenizer, model = load_tokenizer(source), load_model(source).cuda()
    samples = load_samples(DataConfig(sys.argv[2], samples=64))

    def run(mode: str, batch_tokens: int) -> float:
        batches, _ = context_batches(tokenizer, samples, 2048, batch_tokens)
        on_gpu = [{k: v.cuda() for k, v in batch.items()} for batch in batches]
        config = LoraConfig(
            r=128,
            target_modules=NAMES,
            init_lora_weights="corda",
            corda_config=CordaConfig(corda_method=mode),
        )
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        since = time.perf_counter()
        peft.preprocess_corda(model, config, lambda: [model(**batch) for batch in on_gpu])
        torch.cuda.synchronize()
        return time.perf_counter() - since

    def show(name: str, batch_tokens: int = 16384) -> None:
        for mode in ("ipm", "kpm"):
            run(mode, batch_tokens)
            seconds = sorted(run(mode, batch_tokens) for _ in range(3))[1]
            print(f"{name:45} {mode} {seconds:.3f} s, {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB", flush=True)

    show("as it is")
    for batch_tokens in (2048, 8192, 32768):
        show(f"batches of {batch_tokens} tokens", batch_tokens)
    with patch.object(peft, "chosen_components", partial(chosen_components, solver="gram")):
        show("all components, by gram")
    with patch.object(covariance, "add_gram", a_product_a_sample):
        show("a product a sample, both triangles")
    with patch.object(covariance, "_kernel", lambda: None):
        show("float32 products, no kernel")
    for mode in ("ipm", "kpm"):
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
            run(mode, 16384)
        kernels = [e for e in found.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
        print(f"\n{mode}: the GPU is busy for {sum(e.self_device_time_total for e in kernels) / 1e3:.0f} ms")
        for e in sorted(kernels, key=lambda e: -e.self_device_time_total)[:14]:
            print(f"{e.self_device_time_total / 1e3:9.1f} ms {e.count:5} {e.key[:80]}")


def a_product_a_sample(total: Any, x: Tensor, lengths: Sequence[int], scales: Tensor) -> Tensor:
    """What PyTorch alone can do without a wait for the device."""
    total = scales.new_zeros(x.shape[1], x.shape[1]) if total is None else total
    for rows, weight in zip(x.split(list(lengths)), scales.square()):
        total.addcmul_(torch.mm(rows.T, rows, out_dtype=torch.float32), weight)
    return total


if __name__ == "__main__":
    main()
