"""Both sides of every layer, block by block, against one backward through the whole model in float64."""

import pytest
import tiny
import torch

from corda_lora import CordaError
from corda_lora.algebra.second_order import drawn_log_likelihood, uniform
from corda_lora.config import ModelConfig
from corda_lora.data.batches import Encoded, batch_by_length, pad
from corda_lora.models.loading import load_model, open_model
from corda_lora.models.lockstep import find_blocks, parking
from corda_lora.models.targets import find_targets
from corda_lora.preprocess import backward
from corda_lora.preprocess.backward import walk_back
from corda_lora.preprocess.context import Context, answer_mask, token_masks
from corda_lora.preprocess.statistics import collect_statistics
from corda_lora.preprocess.walk import Place

CAUSAL = ["llama", "llama_tied", "qwen2_biased", "qwen3", "mistral", "gemma2", "gemma3", "gpt2_conv1d", "phi3"]
CAUSAL += ["falcon", "bloom", "gpt_neox", "mamba", "lfm2"]
EXPERTS = ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"]  # whose kernels know no float64
CPU = Place(torch.device("cpu"))


def batches():
    """Padded batches whose answers are the latter half of each sample; one sample has none."""
    made = []
    for batch in tiny.batches():
        real = batch["attention_mask"].bool()
        answer = real & (2 * real.cumsum(1) > real.sum(1, keepdim=True))
        answer[0] &= len(made) > 0
        made.append({**batch, "labels": batch["input_ids"].masked_fill(~answer, -100)})
    return made


def reference(model, targets, batches, skip_tokens=0):
    """C and D of every layer by one backward a batch; tokens are told apart by where the padding is."""
    sums, tokens = {}, 0
    for number, batch in enumerate(batches):
        kept = {}
        hooks = [
            module.register_forward_hook(lambda m, args, y, name=name, kept=kept: kept.update({name: (args[0], y)}))
            for name, module in targets.items()
        ]
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        logits = model(**inputs, use_cache=False).logits[:, :-1][answer_mask(batch)]
        gradients = torch.autograd.grad(
            drawn_log_likelihood(logits, uniform(len(logits), number)), [y for _, y in kept.values()]
        )
        for hook in hooks:
            hook.remove()
        counted = token_masks(batch, skip_tokens=skip_tokens)[0].flatten()
        tokens += int(counted.sum())
        for (name, (x, _)), g in zip(kept.items(), gradients):
            parts = [v.detach().reshape(-1, v.shape[-1])[counted] for v in (x, g)]
            before = sums.get(name, (0, 0))
            sums[name] = tuple(total + v.T @ v for total, v in zip(before, parts))
    return {name: tuple(total / tokens for total in both) for name, both in sums.items()}


def both_sides(model, targets, batches, place=CPU, **context):
    found = {}
    for step in walk_back(model, targets, Context(batches, **context), place):
        for members, Cs in step.groups or []:
            for name in members:
                found[name] = (Cs[0].clone(), step.gradients[name].clone())
    return found


@pytest.mark.parametrize("family", CAUSAL + EXPERTS)
def test_they_are_those_of_one_backward(family):
    exactness = 1e-4 if family in EXPERTS else 1e-9
    model = tiny.build(family, torch.float32 if family in EXPERTS else torch.float64)
    targets = find_targets(model, "all-linear")
    expected, found = reference(model, targets, batches()), both_sides(model, targets, batches())
    same(found, expected, exactness)
    assert all(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


def same(found, expected, exactness=1e-9):
    assert found.keys() == expected.keys()
    for name, both in found.items():
        for M, exact in zip(both, expected[name]):
            torch.testing.assert_close(M, exact, rtol=exactness, atol=exactness * float(exact.abs().max()))


def llama():
    model = tiny.build("llama", torch.float64)
    return model, find_targets(model, "all-linear")


def test_they_are_those_of_a_model_that_fits():
    """The same samples in the same batches give the same answers, whichever way."""
    model, targets = llama()
    generator, encoded = torch.Generator().manual_seed(0), []
    for i in range(20):
        ids = torch.randint(3, tiny.VOCABULARY, (4 + i % 8,), generator=generator).tolist()
        encoded.append(Encoded(ids, [False] * 3 + [True] * (len(ids) - 3)))
    fits = collect_statistics(model, targets, encoded, 0, batch_tokens=40, directions=48, progress=False)
    indices = batch_by_length([len(e.ids) for e in encoded], 40)
    padded = [pad([encoded[i].ids for i in part], 0) for part in indices]
    batches = [
        {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask * torch.arange(ids.shape[1]) > 2, -100)}
        for ids, mask in padded
    ]
    for name, both in both_sides(model, targets, batches).items():
        for M, low in zip(both, fits.layers[name]):
            whole = low.factor @ low.factor.T + low.diagonal.diag()
            torch.testing.assert_close(whole.double(), M, rtol=1e-4, atol=1e-6 * float(M.diagonal().max()))


def test_skipped_tokens_count_on_neither_side():
    model, targets = llama()
    same(both_sides(model, targets, batches(), skip_tokens=2), reference(model, targets, batches(), skip_tokens=2))


def test_padding_may_be_on_the_left():
    model, targets = llama()
    flipped = [{key: x.flip(1) for key, x in batch.items()} for batch in tiny.batches()]
    same(both_sides(model, targets, flipped), reference(model, targets, flipped))


def test_without_labels_every_token_with_one_before_it_is_an_answer():
    (batch, *_) = tiny.batches()
    assert answer_mask(batch).sum(1).tolist() == [8, 3, 11]
    labels = batch["input_ids"].masked_fill(torch.arange(12) < 6, -100)
    assert answer_mask({**batch, "labels": labels}).sum(1).tolist() == [3, 0, 6]


def test_the_output_head_is_run_on_a_part_of_the_answers_at_a_time(monkeypatch):
    model, targets = llama()
    expected, rows = both_sides(model, targets, batches()), []
    monkeypatch.setattr(backward, "LOGITS", 2 * tiny.VOCABULARY)
    hook = model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[:-1].numel()))
    found = both_sides(model, targets, batches())
    hook.remove()
    assert max(rows) == 2
    assert sum(rows) == sum(int(answer_mask(batch).sum()) for batch in batches())
    same(found, expected)


def test_layers_with_the_same_input_share_its_covariance():
    model, targets = llama()
    steps = list(walk_back(model, targets, Context(batches()), CPU))
    assert [step.names[0].split(".")[2] for step in steps] == ["1", "0"]
    groups = [[name.rpartition(".")[2] for name in members] for members, _ in steps[0].groups]
    assert groups == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_parked_and_from_a_checkpoint_they_are_the_same(tmp_path, where):
    tiny.build("llama").save_pretrained(tmp_path / "model", max_shard_size="20KB")
    model, stored = open_model(ModelConfig(str(tmp_path / "model")))
    whole = load_model(ModelConfig(str(tmp_path / "model")))
    blocks, held = list(find_blocks(model, ["model.layers.0.mlp"]).values()), []

    def counted(read):
        def count():
            held.append(sum(block.mlp.up_proj.weight.untyped_storage().nbytes() > 100 for block in blocks))
            return read()

        return count

    stored = {tensor: counted(read) for tensor, read in stored.items()}
    targets = find_targets(model, "all-linear")
    found = both_sides(model, targets, batches(), Place(CPU.device, stored, parking(where, tmp_path)))
    assert max(held) == 1  # a block's weights are gone before the next one's are read
    expected = both_sides(whole, find_targets(whole, "all-linear"), batches())
    for name, both in found.items():
        assert all(torch.equal(M, exact) for M, exact in zip(both, expected[name]))


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["device", "cpu"])
def test_on_a_gpu_they_are_the_same(where):
    model, targets = llama()
    found = both_sides(model, targets, batches(), Place(torch.device("cuda"), None, parking(where)))
    # The rotary tables are float32 in this float64 model, too: a GPU's cosines differ from the CPU's in the last bit.
    same({name: [M.cpu() for M in both] for name, both in found.items()}, both_sides(model, targets, batches()), 1e-6)
    assert next(model.parameters()).device.type == "cpu"


def test_gradients_pass_through_layers_that_are_finished():
    model, targets = llama()
    expected = both_sides(model, targets, batches())
    late = [name for name in targets if ".layers.1." in name]
    last, first = walk_back(model, targets, Context(batches()), CPU, finished=late)
    assert last == (late, None, {})
    assert all(torch.equal(D, expected[name][1]) for name, D in first.gradients.items())


def test_in_half_precision_they_are_near():
    exact, targets = llama()
    expected = both_sides(exact, targets, batches())
    found = both_sides(model := tiny.build("llama", torch.bfloat16), find_targets(model, "all-linear"), batches())
    for name, (C, D) in found.items():
        assert C.dtype == D.dtype == torch.float32
        assert (C - expected[name][0]).norm() < 0.05 * expected[name][0].norm()


@pytest.mark.parametrize(
    ("family", "modules", "message"),
    [
        ("bert", "all-linear", "BertForSequenceClassification is no causal language model"),
        ("t5", "all-linear", "T5ForConditionalGeneration is no causal language model"),
        ("opt", "all-linear", "model.decoder.project_in is outside of the model's blocks"),
        ("llama", ["lm_head", "q_proj"], "lm_head is outside of the model's blocks"),
    ],
)
def test_what_has_no_other_side_is_refused(family, modules, message):
    model = tiny.build(family)
    with pytest.raises(CordaError, match=message):
        next(walk_back(model, find_targets(model, modules), Context(tiny.batches(family)), CPU))


def test_a_context_without_answers_is_refused():
    model, targets = llama()
    silent = [{**batch, "labels": torch.full_like(batch["input_ids"], -100)} for batch in tiny.batches()]
    with pytest.raises(CordaError, match="no sample of the context has a response"):
        next(walk_back(model, targets, Context(silent), CPU))


def test_a_model_that_is_no_chain_is_refused():
    model, targets = llama()
    hook = model.model.layers[1].register_forward_pre_hook(lambda block, args: (args[0] + 1, *args[1:]))
    with pytest.raises(CordaError, match="the blocks of LlamaForCausalLM do not form a chain"):
        next(walk_back(model, targets, Context(batches()), CPU))
    hook.remove()
    seen = []
    model.model.layers[0].register_forward_hook(lambda block, args, x: seen.append(x))
    model.model.norm.register_forward_pre_hook(lambda norm, args: (args[0] + seen[-1],))
    with pytest.raises(CordaError, match="the head of LlamaForCausalLM reads more than its last block"):
        next(walk_back(model, targets, Context(batches()), CPU))
    assert not any("forward" in vars(block) for block in model.model.layers)


def test_what_is_not_finite_is_named():
    model, targets = llama()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(CordaError, match="Invalid value found in the output of LlamaForCausalLM's last block"):
        next(walk_back(model, targets, Context(batches()), CPU))
