"""Which layers are adapted, and what their weights are."""

from types import SimpleNamespace

import peft
import pytest
import tiny
import torch
from torch import nn

from corda_lora.config import CordaError
from corda_lora.models.targets import find_targets
from corda_lora.models.weights import layer_digest, weight_of


def test_a_regular_expression_matches_whole_names():
    model = tiny.build("llama")
    matched = find_targets(model, r"model\.layers\.\d\.self_attn\.[qv]_proj")
    assert list(matched) == [f"model.layers.{i}.self_attn.{n}_proj" for i in range(2) for n in "qv"]
    with pytest.raises(CordaError, match=r"matches no layer of LlamaForCausalLM \(a bare name is a pattern for whole"):
        find_targets(model, "q_proj")


def test_a_regular_expression_that_takes_too_long():
    with pytest.raises(CordaError, match=r"^target_modules .* takes more than a second on the text 'model.layers"):
        find_targets(tiny.build("llama"), r"(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)\1\2\3q")


class Linear4bit(nn.Linear):
    """Stands for bitsandbytes' layer on a CPU with AVX512: the first forward leaves its 4-bit numbers in another order,
    which it says in the quant state, and `state_dict` puts them back."""

    def __init__(self, numbers):
        super().__init__(*numbers.shape[::-1], bias=False)
        packed = nn.Parameter((numbers[:, ::2] * 16 + numbers[:, 1::2]).reshape(-1, 1), requires_grad=False)
        packed.quant_state = SimpleNamespace(packing_format_for_cpu=False)
        self.weight = packed

    def reorder(self, packing):
        self.weight.data = self.weight.data.flip(0)
        self.weight.quant_state.packing_format_for_cpu = packing

    def _save_to_state_dict(self, *args, **kwargs):
        if self.weight.quant_state.packing_format_for_cpu:
            self.reorder(packing=False)
        super()._save_to_state_dict(*args, **kwargs)


def dequantized(module):
    flat = module.weight.flatten()
    return torch.stack([flat // 16, flat % 16], dim=1).reshape(module.out_features, module.in_features).float()


def test_a_quantized_weight_that_a_forward_has_reordered(monkeypatch):
    monkeypatch.setattr("corda_lora.models.weights.dequantize_module_weight", dequantized)
    numbers = torch.randint(16, (6, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    layer = Linear4bit(numbers)
    digest = layer_digest(layer)
    layer.reorder(packing=True)
    assert not torch.equal(dequantized(layer), numbers.float())
    assert torch.equal(weight_of(layer), numbers.float())
    layer.reorder(packing=True)
    assert layer_digest(layer) == digest


def test_peft_is_asked_about_each_kind_of_layer_once(monkeypatch):
    asked, inner = [], peft.get_peft_model

    def spy(model, config, **options):
        asked.append(sorted(config.target_modules))
        return inner(model, config, **options)

    monkeypatch.setattr(peft, "get_peft_model", spy)
    targets = find_targets(tiny.build("llama"), "all-linear")
    assert asked == [sorted(name for name in targets if ".0." in name)]
    assert len(targets) == 2 * len(asked[0])
