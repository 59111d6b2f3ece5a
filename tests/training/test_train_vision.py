"""Training of each family of vision-language models, through TRL's trainer."""

import math

import pytest
import tiny_vision
import torch

from corda_lora.config import LoraStart, TrainConfig
from corda_lora.data.batches import encode, padded_batch
from corda_lora.data.samples import as_samples
from corda_lora.models.loading import with_processor
from corda_lora.training.train import plain_lora, train

SIZES = [(24, 24), (40, 24), (24, 64), (64, 64)]


@pytest.mark.parametrize("family", tiny_vision.FAMILIES)
def test_the_loss_that_is_trained_is_the_models_own(family, tmp_path):
    model, processor = tiny_vision.build(family)
    tokenizer = with_processor(processor)
    rows = [{"prompt": "What?" * (i + 1), "response": "a cat", "image": tiny_vision.picture(i, s)}
            for i, s in enumerate(SIZES)]  # fmt: skip
    rows[2]["images"] = [rows[2].pop("image"), tiny_vision.picture(9)]
    samples = [*as_samples(rows), *as_samples([{"prompt": "no image", "response": "yes"}])]
    connector = tiny_vision.CONNECTORS[family]
    config = TrainConfig(
        1e-3, max_steps=3, batch_size=5, precision="fp32", warmup=0, schedule="constant", checkpoints=0
    )
    adapted = plain_lora(model, LoraStart(r=2, modules_to_save=[connector]), config)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert any(f"{connector}.modules_to_save" in name for name in trained)
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    encoded = [encode(tokenizer, s, 500, end=True) for s in samples]
    with torch.no_grad():
        total, count = 0.0, 0
        for e in encoded:
            inputs, answers = padded_batch([e], 0)
            log_probs = adapted(**inputs).logits[0, :-1].log_softmax(-1)
            right = log_probs.gather(1, inputs["input_ids"][0, 1:, None])[:, 0]
            total, count = total - float(right[answers[0, 1:]].sum()), count + int(answers[0, 1:].sum())
    log = train(adapted, tokenizer, samples, config, 500, progress=False)
    assert log["samples"] == 5
    assert math.isclose(log["loss"][0][1], total / count, rel_tol=1e-4)
    assert log["loss"][-1][1] < log["loss"][0][1]
    moved = {name for name, p in adapted.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= trained
    assert any(connector in name for name in moved)
    assert not any("vision" in name and connector not in name for name in moved)
