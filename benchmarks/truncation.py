"""What is lost when the smallest components of every layer are discarded: plain SVD, ASVD, CO-SVD? (CorDA, Table X)

    python benchmarks/truncation.py --model MODEL --context wikitext2/valid.txt --text wikitext2/test.txt

It runs what `corda inspect --levels` runs, and writes its perplexities as a table, with seconds and memory. The same of
a model of LLaMA-2-7B's shape, two contexts of 64 samples of 512 tokens and eight levels:

    python benchmarks/make_llama.py --output llama_7b --size 7b --vocab 49152 --tokenizer DIR --context words.jsonl
    head -n 200 words.jsonl > a.jsonl; tail -n 200 words.jsonl > b.jsonl
    python benchmarks/truncation.py --name truncation_7b --model llama_7b --context a.jsonl b.jsonl --text words.jsonl
        --samples 64 --max_length 512 --windows 32 --park cpu
        --levels 0.004 0.008 0.016 0.031 0.0625 0.125 0.25 0.5
"""

import time

import record
import torch

from corda_lora.config import InspectConfig, ModelConfig
from corda_lora.inspection.contexts import inspect_model
from corda_lora.models.loading import load_tokenizer, open_model
from corda_lora.report.figures import level_text, perplexity


def main() -> None:
    parser = record.parser(__doc__)
    for name in ("model", "text"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--context", nargs="+", required=True)
    parser.add_argument("--samples", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--levels", type=float, nargs="+", default=[0.03125, 0.0625, 0.125, 0.25])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--park", default="auto")
    options = parser.parse_args()
    config = InspectConfig(
        context=options.context,
        text=options.text,
        samples=options.samples,
        levels=options.levels,
        held_out=options.windows,
        max_length=options.max_length,
        park=options.park,
    )
    source = ModelConfig(options.model)
    model, stored = open_model(source)
    since = time.perf_counter()
    found = inspect_model(model, load_tokenizer(source), config, stored).record
    facts = {"seconds": round(time.perf_counter() - since), "contexts": found["contexts"]}
    if torch.cuda.is_available():
        facts["peak_bytes"] = torch.cuda.max_memory_allocated()
    cut = found["truncation"]
    lines = []
    for text, base in cut["base"].items():
        heads = [f"perplexity on {text}, discarded:", "none", *map(level_text, cut["levels"])]
        lines += [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (1 + len(cut["levels"]))]
        for curve in cut["curves"]:
            fewer = f", {curve['samples']} samples" if curve["samples"] and "samples" not in curve["label"] else ""
            cells = [f"{perplexity(loss):,.2f}" for loss in (base, *curve["loss"][text])]
            lines.append(f"| {curve['label']}{fewer} | {' | '.join(cells)} |")
    record.write(options, cut, lines, tokens=cut["tokens"], **facts)


if __name__ == "__main__":
    main()
