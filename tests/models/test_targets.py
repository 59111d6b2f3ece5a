"""Regular expressions in `target_modules`."""

import pytest
import tiny

from corda_lora.config import CordaError
from corda_lora.models.targets import find_targets


def test_a_regular_expression_matches_whole_names():
    model = tiny.build("llama")
    matched = find_targets(model, r"model\.layers\.\d\.self_attn\.[qv]_proj")
    assert list(matched) == [f"model.layers.{i}.self_attn.{n}_proj" for i in range(2) for n in "qv"]
    with pytest.raises(CordaError, match=r"matches no layer of LlamaForCausalLM \(a bare name is a pattern for whole"):
        find_targets(model, "q_proj")


def test_a_regular_expression_that_takes_too_long():
    with pytest.raises(CordaError, match=r"^target_modules .* takes more than a second on the text 'model.layers"):
        find_targets(tiny.build("llama"), r"(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)\1\2\3q")
