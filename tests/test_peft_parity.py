"""Beside PEFT's own CorDA: the same answer where PEFT is right, and closer to it where PEFT is not."""

import copy

import peft
import pytest
import tiny
import torch
from helpers import pefts_damping
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig as PeftCorda
from peft.tuners.lora.corda import collect_eigens_for_layer, preprocess_corda
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from corda_lora import CordaConfig, get_corda_model

TEXT = ["The capital of France is Paris, and its currency is the euro.", "Water boils at 100 degrees Celsius."]


def check(linear, C, r):
    linear.covariance_matrix = C
    eigens, damping = collect_eigens_for_layer(linear, LoraConfig()), pefts_damping(C)
    W, C64 = linear.weight.data, C.double()
    C64 = C64 + damping * C64.diagonal().mean() * torch.eye(len(C), dtype=torch.float64)
    U, sigma, Vh = torch.linalg.svd(W.double() @ C64, full_matrices=False)
    for mode, S in (("ipm", slice(0, r)), ("kpm", slice(len(sigma) - r, len(sigma)))):
        peft_start = (eigens.U_WC[:, S] * eigens.S_WC[S]).double() @ eigens.V_WC[:, S].double().T
        exact = (U[:, S] * sigma[S]) @ Vh[S] @ torch.linalg.inv(C64)
        ours = tiny.start_of(W, C, CordaConfig(mode=mode, r=r, split="paper", damping=damping))
        product, pefts_error = ours.B.double() @ ours.A.double(), (peft_start - exact).norm()
        assert (product - peft_start).norm() <= 1.01 * pefts_error
        assert (product - exact).norm() <= 0.1 * pefts_error
        assert pefts_error < exact.norm()  # it is the same thing


@pytest.mark.parametrize(("m", "n"), [(48, 48), (96, 40), (40, 96), (200, 120)])
def test_decomposition_is_pefts_up_to_pefts_error(m, n):
    torch.manual_seed(m)
    X = torch.randn(3 * n, n) * torch.logspace(-1, 1, n)
    check(nn.Linear(n, m, bias=False), X.T @ X / len(X), r=8)


@torch.no_grad()
def test_decomposition_is_pefts_on_a_real_layer(smollm2):
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    batch = AutoTokenizer.from_pretrained(smollm2)("\n".join(TEXT), return_tensors="pt")
    name = "model.layers.3.self_attn.o_proj"
    layer = model.get_submodule(name)
    C = tiny.covariances_of(model, {name: layer}, [batch])[name]
    check(layer, C, r=16)


@pytest.mark.filterwarnings("ignore:the context has")
def test_first_logits_in_bfloat16_move_no_more_than_pefts():
    model = tiny.build("llama", torch.bfloat16)
    batch = tiny.batches()[2]
    before = tiny.logits(model)

    start = LoraConfig(
        r=8,
        lora_alpha=8,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights="corda",
        corda_config=PeftCorda(corda_method="kpm"),
    )
    pefts = copy.deepcopy(model)
    with torch.no_grad():
        preprocess_corda(pefts, start, run_model=lambda: [pefts(ids[None]) for ids in batch["input_ids"]])
        pefts = peft.get_peft_model(pefts, start).eval()
    moved = (tiny.logits(pefts) - before).abs().max()
    assert moved > 0

    for split in ("paper", "balanced", "anchored"):
        config = CordaConfig(r=8, split=split, target_modules=start.target_modules)
        ours = get_corda_model(copy.deepcopy(model), config, [batch], progress=False)
        assert torch.equal(tiny.logits(ours), before)
