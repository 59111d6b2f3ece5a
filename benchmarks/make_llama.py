"""Write a checkpoint of LLaMA's shape with random bfloat16 weights, and a context of random words, to measure on.

    python benchmarks/make_llama.py --output DIR --size 7b [--layers 32] [--vocab 49152] [--shard_gb 2]
        [--tokenizer DIR] [--context words.jsonl] [--words 520] [--seed 0]

The weights are made and written one shard at a time, on the GPU if there is one. Matrices are normal with standard
deviation 0.02, those that write to the residual stream with 0.02/√(2·layers), norms are one. (A GPU's random numbers
are not the CPU's: the same seed gives the same weights on the same kind of device.)
"""

import argparse
import json
import random
import shutil
import string
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {  # hidden, intermediate, layers, heads, key and value heads
    "7b": (4096, 11008, 32, 32, 32),  # LLaMA-2-7B
    "1b": (2048, 5632, 22, 32, 4),  # TinyLlama-1.1B
    "small": (576, 1536, 30, 9, 3),  # SmolLM2-135M
    "tiny": (256, 704, 4, 4, 2),  # to try the scripts
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
WORDS = 1_040_000  # of a context


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the checkpoint's folder; new, or empty")
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--layers", type=int, help="default: the size's")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--shard_gb", type=float, default=2.0, help="a larger tensor has a shard to itself")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer, which is copied")
    parser.add_argument("--context", type=Path, help="file to write: rows of random words")
    parser.add_argument("--words", type=int, default=520, help="of a row; each is at least a token (default: 520)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    since = time.perf_counter()
    hidden, intermediate, layers, heads, key_heads = SIZES[options.size]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=options.layers or layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=options.vocab,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    if options.tokenizer and (tokens := vocabulary_size(options.tokenizer)) > options.vocab:
        raise SystemExit(f"the tokenizer has {tokens} tokens, the model {options.vocab}: give --vocab {tokens}")
    options.output.mkdir(parents=True, exist_ok=True)
    if any(options.output.iterdir()):
        raise SystemExit(f"{options.output} has something in it already")
    config.save_pretrained(options.output)
    shards, total = write_weights(config, options.output, int(options.shard_gb * 1e9), options.seed)
    if options.tokenizer:
        for path in [options.tokenizer / name for name in TOKENIZER_FILES]:
            if path.is_file():
                shutil.copy(path, options.output)
    if options.context:
        write_context(options.context, options.words, options.seed)
    seconds = time.perf_counter() - since
    print(f"{options.output}: {total / 2e9:.2f} billion weights, {total / 1e9:.2f} GB, {shards} files, {seconds:.1f} s")


def write_weights(config: LlamaConfig, folder: Path, shard_bytes: int, seed: int) -> tuple[int, int]:
    """Write the shards and their index. Returns their number, and the bytes of all weights."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    shards: list[list[str]] = [[]]
    filled = total = 0
    for name, shape in shapes.items():
        size = 2 * shape.numel()
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled, total = filled + size, total + size
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name in names:
            tensor = torch.ones(shapes[name], dtype=torch.bfloat16, device=device)
            if tensor.ndim == 2:
                to_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / (2 * config.num_hidden_layers) ** 0.5 if to_residual else 0.02
                tensor.normal_(std=std, generator=generator)
            tensors[name] = tensor.cpu()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return len(shards), total


def vocabulary_size(tokenizer: Path) -> int:
    """Tokens of a tokenizer.json, those that were added to it too."""
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]  # of a Unigram model a list, else a mapping to ids
    ids = range(len(vocab)) if isinstance(vocab, list) else vocab.values()
    return 1 + max([*ids, *(token["id"] for token in content.get("added_tokens", []))])


def write_context(path: Path, length: int, seed: int) -> None:
    """Rows {"text": random words}."""
    draw = random.Random(seed)
    words = ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(3, 9))) for _ in range(20_000)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        for _ in range(WORDS // length):
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=length))}) + "\n")


if __name__ == "__main__":
    main()
