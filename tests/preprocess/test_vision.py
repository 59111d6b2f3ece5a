"""Covariances of vision-language models, image tokens included, against plain hooked float64 forwards."""

import pytest
import tiny_vision
import torch

from corda_lora.algebra.second_order import drawn_log_likelihood, uniform
from corda_lora.config import CordaConfig, CordaError
from corda_lora.data.samples import as_samples
from corda_lora.models.loading import with_processor
from corda_lora.models.targets import choose_targets, find_targets, image_side
from corda_lora.preprocess.backward import walk_back
from corda_lora.preprocess.context import Context, answer_mask, read_context
from corda_lora.preprocess.walk import Place, walk

CPU = Place(torch.device("cpu"))
QUESTIONS = [
    ("What is it?", "a cat", [(40, 24)]),
    ("How many?", "2", [(24, 24)]),
    ("<image>\nand <image> differ?", "yes, in colour", [(24, 40), (64, 64)]),
    ("no picture here", "none", []),
    ("What is shown?", "a wide one", [(64, 24)]),
]


@pytest.fixture(scope="module", params=tiny_vision.FAMILIES)
def family(request):
    """A model in float64, its processor, samples of all kinds and a context of several batches of them."""
    model, processor = tiny_vision.build(request.param, torch.float64)
    rows = [
        {"messages": chat_of(prompt, response, sizes), "images": [tiny_vision.picture(i + 1, s) for s in sizes]}
        for i, (prompt, response, sizes) in enumerate(QUESTIONS)
    ]
    samples = as_samples(rows)
    context = read_context(with_processor(processor), [samples], 500, 180)
    assert len(context.batches) > 1
    return request.param, model, processor, samples, context


def chat_of(prompt, response, sizes):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def as_published(processor, sample):
    """What the processor itself makes of a sample."""
    messages = [
        m | {"content": m["content"] if isinstance(m["content"], list) else [{"type": "text", "text": m["content"]}]}
        for m in sample.messages
    ]
    text = processor.apply_chat_template(messages, tokenize=False)
    images = {"images": [[p.open() for p in sample.images]]} if sample.images else {}
    return processor(text=[text], **images, return_tensors="pt")


def test_covariances_are_those_of_a_plain_forward_of_each_sample_alone(family):
    _, model, processor, samples, context = family
    targets = choose_targets(model, CordaConfig(r=4))
    for tokens in ("all", "text", "image"):
        sums, count = dict.fromkeys(targets, 0), 0
        for sample in samples:
            inputs = as_published(processor, sample)
            ids = inputs["input_ids"][0]
            of_image = ids == model.config.image_token_id
            counts = {"all": torch.ones_like(of_image), "text": ~of_image, "image": of_image}[tokens]
            seen = {}
            hooks = [
                module.register_forward_hook(lambda m, args, out, name=name, seen=seen: seen.update({name: args[0][0]}))
                for name, module in targets.items()
            ]
            with torch.no_grad():
                model(**inputs, use_cache=False)
            for hook in hooks:
                hook.remove()
            for name, x in seen.items():
                sums[name] = sums[name] + x[counts].T @ x[counts]
            count += int(counts.sum())
        assert count >= 20
        found = {}
        for _, groups in walk(model, targets, Context(context.batches, tokens=tokens), CPU):
            found |= {name: C for members, (C,) in groups for name in members}
        assert found.keys() == targets.keys()
        for name, C in found.items():
            torch.testing.assert_close(C.double(), sums[name] / count, rtol=1e-6, atol=1e-6 * C.abs().max().item())


def test_both_sides_are_those_of_one_backward_through_the_whole_model(family):
    _, model, _, _, context = family
    targets = choose_targets(model, CordaConfig(r=4))
    sums, count = dict.fromkeys(targets, 0), 0
    for number, batch in enumerate(context.batches):
        outputs = {}
        hooks = [
            module.register_forward_hook(lambda m, args, y, name=name, outputs=outputs: outputs.update({name: y}))
            for name, module in targets.items()
        ]
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        answers, real = answer_mask(batch), batch["attention_mask"].bool()
        log_likelihood = drawn_log_likelihood(logits[:, :-1][answers], uniform(int(answers.sum()), number))
        for name, g in zip(outputs, torch.autograd.grad(log_likelihood, list(outputs.values()))):
            sums[name] = sums[name] + g[real].T @ g[real]
        count += int(real.sum())
    found = {}
    for step in walk_back(model, targets, context, CPU):
        found |= {name: D.clone() for name, D in step.gradients.items()}
    assert found.keys() == targets.keys()
    for name, D in found.items():
        assert D.abs().max() > 0
        torch.testing.assert_close(D.double(), sums[name] / count, rtol=1e-6, atol=1e-6 * D.abs().max().item())


def test_what_sees_images_is_no_target(family):
    name, model, *_ = family
    sees = image_side(model)
    targets = find_targets(model, "all-linear")
    assert len(targets) == 14
    assert not any(sees(target) for target in targets)
    assert not any(sees(t) for t in find_targets(model, ["q_proj", "v_proj", "fc1"]))
    pattern = {"qwen2_vl": r".*\.attn\.qkv", "qwen2_5_vl": r".*\.attn\.qkv"}.get(name, r".*\.q_proj")
    with pytest.raises(CordaError, match="vision tower or the connector"):
        find_targets(model, pattern)
    connector = tiny_vision.CONNECTORS[name]
    kept = choose_targets(model, CordaConfig(r=4, modules_to_save=[connector]))
    assert kept.keys() == targets.keys()
    assert all(sees(n) for n, _ in model.named_modules() if n.endswith(connector))
