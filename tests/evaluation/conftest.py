"""A tuned model to measure."""

import pytest
import tiny
import torch

from corda_lora import CordaConfig, get_corda_model


@pytest.fixture(scope="package")
def adapted():
    """A tiny LLaMA with an adapter whose parameters have moved."""
    model = get_corda_model(tiny.build("llama"), CordaConfig(r=4), tiny.batches(), progress=False).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model
