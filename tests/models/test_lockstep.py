"""One block at a time: the order of things, what is on the device, and that nothing is left behind."""

import threading
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch
import transformers

from corda_lora import CordaConfig, CordaError
from corda_lora.models.lockstep import find_blocks, lockstep, on_device, parking, shared_out, tensors_of
from corda_lora.models.targets import find_targets
from corda_lora.preprocess import pipeline as preprocess
from corda_lora.preprocess.collect import Collector
from corda_lora.preprocess.context import Context
from corda_lora.preprocess.walk import Place, walk

CPU = torch.device("cpu")
FAMILIES = ["llama", "gemma3", "gpt2_conv1d", "bert", "roberta", "t5", "mixtral"]


def blocks_of(model):
    return find_blocks(model, list(find_targets(model, "all-linear")))


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def record_runs(model):
    """A list that fills with the names of the blocks as they run."""
    runs = []
    for name, block in blocks_of(model).items():
        block.register_forward_hook(lambda *_, name=name: runs.append(name))
    return runs


@pytest.mark.parametrize("family", FAMILIES)
def test_each_block_runs_once_a_batch_and_all_batches_before_the_next(family):
    model, batches = tiny.build(family), tiny.batches(family)
    blocks = blocks_of(model)
    assert len(blocks) == (4 if family == "t5" else 2)
    runs = record_runs(model)
    list(tiny.steps(model, find_targets(model, "all-linear"), batches))
    assert runs == [name for name in blocks for _ in batches]


def test_a_block_is_done_when_it_is_yielded_and_the_next_has_not_begun():
    model, batches = tiny.build("llama"), tiny.batches()
    runs = record_runs(model)
    for i, (names, groups) in enumerate(tiny.steps(model, find_targets(model, "all-linear"), batches)):
        assert runs.count(f"model.layers.{i}") == len(batches)
        assert f"model.layers.{i + 1}" not in runs
        assert names == [name for members, _ in groups for name in members]
        assert set(names) == {n for n in find_targets(model, "all-linear") if f"layers.{i}." in n}


def test_the_output_head_is_not_computed_where_nothing_after_the_blocks_is_asked_for():
    model, runs = tiny.build("llama"), []
    model.lm_head.register_forward_pre_hook(lambda *_: runs.append("head"))
    for to_end in (False, True):
        for _, run in lockstep(model, list(model.model.layers), tiny.batches(), to_end=to_end):
            run()
        assert len(runs) == (3 if to_end else 0)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2_conv1d", "bert", "t5"])
def test_outputs_are_those_of_a_plain_forward(family):
    model, batches = tiny.build(family), tiny.batches(family)
    outputs = []
    hook = model.register_forward_hook(lambda module, args, output: outputs.append(output.logits))
    for _, run in lockstep(model, list(blocks_of(model).values()), batches, to_end=True):
        run()
    hook.remove()
    with torch.no_grad():
        for batch, output in zip(batches, outputs, strict=True):
            assert torch.equal(output, model(**batch).logits)


def test_only_one_block_is_on_the_device(monkeypatch):
    model, active, most = tiny.build("llama"), set(), []
    owner = {id(t): name for name, block in blocks_of(model).items() for t in tensors_of(block)}

    @contextmanager
    def recorded(tensors, device, stored):
        here = {owner.get(id(t), "rest") for t in tensors}
        active.update(here)
        most.append(set(active))
        yield
        active.difference_update(here)

    monkeypatch.setattr("corda_lora.preprocess.walk.on_device", recorded)
    monkeypatch.setattr("corda_lora.models.lockstep.on_device", recorded)
    for name, block in blocks_of(model).items():
        block.mlp.register_forward_hook(lambda *_, name=name: most.append({*active} | {f"run {name}"}))
    list(tiny.steps(model, find_targets(model, "all-linear"), tiny.batches()))
    layers = [{n for n in seen if "model.layers" in n} for seen in most]
    assert all(len({n for n in seen if not n.startswith("run")}) <= 1 for seen in layers)
    assert sum(seen == {f"model.layers.{i}", f"run model.layers.{i}"} for i in (0, 1) for seen in layers) == 6
    assert active == set()


def test_on_device_gives_back_the_very_memory():
    block, device = tiny.build("llama").model.layers[0], torch.device("cpu", 0)  # "cpu:0" is not "cpu" to torch
    before = [t.data_ptr() for t in tensors_of(block)]
    with on_device(tensors_of(block), device):
        assert not set(before) & {t.data_ptr() for t in tensors_of(block)}
    assert [t.data_ptr() for t in tensors_of(block)] == before

    with pytest.raises(KeyError), on_device(tensors_of(block), device):
        raise KeyError
    assert [t.data_ptr() for t in tensors_of(block)] == before


# --- beside computing ------------------------------------------------------------------------------------------------


def test_the_next_block_is_read_while_one_computes(monkeypatch):
    """By a thread, which is held up here until the block before has run; each block once, and one ahead."""
    monkeypatch.setattr("corda_lora.models.lockstep.has_streams", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    model = tiny.build("llama")
    plain = preprocess.preprocess(model, CordaConfig(r=4), tiny.batches(), progress=False)
    reads, ran, threads = [], [threading.Event() for _ in blocks_of(model)], set()

    def reader(name, number, values):
        def read():
            threads.add(threading.current_thread())
            assert number == 0 or ran[number - 1].wait(20)
            reads.append(name)
            return values

        return read

    stored = {}
    for number, (block, ran_now) in enumerate(zip(blocks_of(model).values(), ran)):
        block.register_forward_hook(lambda *_, ran_now=ran_now: ran_now.set())
        for name, tensor in block.named_parameters(prefix=str(number)):
            stored[tensor] = reader(name, number, tensor.data)
            tensor.data = torch.full_like(tensor, torch.nan)
    start = preprocess.preprocess(model, CordaConfig(r=4), tiny.batches(), progress=False, stored=stored)
    assert all(torch.equal(plain.layers[n].A, layer.A) for n, layer in start.layers.items())
    assert len(reads) == len(set(reads)) == len(stored)
    assert threading.current_thread() not in threads
    assert not any(thread.is_alive() for thread in threads)


def test_a_block_that_cannot_be_read_ahead_is_an_error_when_it_is_reached(monkeypatch):
    monkeypatch.setattr("corda_lora.models.lockstep.has_streams", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    model, done = tiny.build("llama"), []

    def fail():
        raise OSError("the shard is gone")

    stored = {model.model.layers[1].mlp.up_proj.weight: fail}
    weights, targets = tiny.snapshot(model), find_targets(model, "all-linear")
    steps = walk(model, targets, Context(tiny.batches()), Place(CPU, stored))
    with pytest.raises(OSError, match="the shard is gone"):
        done.extend(names for names, _ in steps)
    assert len(done) == 1
    assert all(torch.equal(weights[n], t) for n, t in model.state_dict().items())
    assert hooks_of(model) == 0


def test_copies_are_waited_for_a_batch_later_and_all_at_the_end_of_a_block(monkeypatch):
    """What was parked is still being copied while the next batch runs; more than that is never held."""
    model, batches, running, pending, held = tiny.build("llama"), 3 * tiny.batches(), [], set(), []

    @contextmanager
    def recorded(device):
        copy = running[-1], object()
        pending.add(copy)
        yield lambda: pending.discard(copy)

    def on_batch(index):
        held.append({batch for batch, _ in pending})
        running.append(index)

    monkeypatch.setattr("corda_lora.models.lockstep.beside", recorded)
    for _, run in lockstep(model, list(blocks_of(model).values()), batches, on_batch, park=parking("cpu")):
        assert not pending
        run()
    assert not pending
    assert held[:9] == [{*range(9)[max(0, i - 2) : i]} for i in range(9)]  # the older is waited for before i runs


def large(device, dtype=torch.bfloat16):
    """A model of some size, and batches of it, some padded: so much work that what does not wait is caught."""
    torch.manual_seed(0)
    size = tiny.SIZE | {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size | {"max_position_embeddings": 512}))
    batches = []
    for seed in range(24):
        ids, mask = tiny.padded([512] * 8 if seed % 3 else [512, 400, 100, 512, 17, 512, 300, 512], 512, seed)
        batches.append({"input_ids": ids.to(device), "attention_mask": mask.to(device)})
    return model.to(device, dtype).eval(), batches


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_states_parked_from_a_gpu_come_back_as_they_were(place, tmp_path):
    model, batches = large("cuda")
    with torch.no_grad():
        plain = [model(**batch).logits.cpu() for batch in batches]
    blocks = list(blocks_of(model).values())
    batches = [{**batch, "use_cache": False} for batch in batches]  # each would hold its keys

    def run_all(batches):
        """Their outputs, and the most memory that any block took beyond what there was before it."""
        outputs, most = [], 0
        hook = model.register_forward_hook(lambda module, args, output: outputs.append(output.logits.cpu()))
        for _, run in lockstep(model, blocks, batches, to_end=True, park=parking(place, tmp_path)):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            torch.cuda.synchronize()
            most = max(most, torch.cuda.max_memory_allocated() - before)
        hook.remove()
        return outputs, most

    few, many = run_all(batches[:4]), run_all(batches)
    assert all(torch.equal(output, expected) for output, expected in zip(many[0], plain, strict=True))
    state = batches[0]["input_ids"].numel() * 1024 * 2
    assert many[1] < few[1] + 4 * state  # of 24 batches


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["corda", "corda++"])
def test_a_model_that_visits_the_gpu_starts_as_one_that_is_there(preset):
    config = CordaConfig(preset=preset, r=8, **({"rounds": 3} if preset == "corda++" else {}))
    (model, batches), starts = large("cpu"), []
    inside = replace(config, device="cuda")
    starts.append(preprocess.preprocess(model, inside, batches, progress=False, park="cpu"))
    home = {n: p.data_ptr() for n, p in model.named_parameters()}
    read = {p: partial(getattr, p.detach().clone(), "data") for p in model.parameters()}
    starts.append(preprocess.preprocess(model, inside, batches, progress=False, stored=read))
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == home
    starts.append(preprocess.preprocess(model.cuda(), config, batches, progress=False, park="device"))
    for start in starts[:2]:
        for name, layer in starts[2].layers.items():
            assert torch.equal(start.layers[name].A, layer.A), name
            assert torch.equal(start.layers[name].B, layer.B), name


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["device", "cpu"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_the_host_waits_for_nothing_inside_a_block(place, per_sample, monkeypatch):
    model, batches = large("cuda")
    targets = find_targets(model, "all-linear")

    def watched(*args):
        for block, run in lockstep(*args):

            def strict(run=run):
                torch.cuda.set_sync_debug_mode("error")
                try:
                    run()
                finally:
                    torch.cuda.set_sync_debug_mode("default")

            yield block, strict

    monkeypatch.setattr("corda_lora.preprocess.walk.lockstep", watched)
    collector = Collector(model, targets, Context(batches), per_sample=per_sample)
    cuda = Place(torch.device("cuda", 0), park=parking(place))
    steps = list(walk(model, targets, Context(batches), cuda, collector=collector))
    assert all(torch.isfinite(C).all() for _, groups in steps for _, Cs in groups for C in Cs)


@pytest.mark.parametrize("training", [True, False])
def test_a_failing_forward_is_passed_on_and_leaves_nothing(training):
    model = tiny.build("llama").train(training)
    weights, calls = tiny.snapshot(model), []

    def fail(*_):
        calls.append(1)
        if len(calls) == 2:
            raise ArithmeticError("in the second batch")

    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(ArithmeticError, match="in the second batch"):
        preprocess.preprocess(model, CordaConfig(r=4), tiny.batches(), progress=False)
    handle.remove()
    assert hooks_of(model) == 0
    assert model.training is training
    assert all(torch.equal(weights[n], t) for n, t in model.state_dict().items())


def test_stopping_early_leaves_nothing():
    model = tiny.build("llama")
    steps = tiny.steps(model, find_targets(model, "all-linear"), tiny.batches())
    next(steps)
    assert hooks_of(model) > 0
    steps.close()
    assert hooks_of(model) == 0


@pytest.mark.parametrize("split", ["paper", "balanced", "anchored", "seeded"])
def test_preprocess_changes_nothing_of_the_model(split):
    model = tiny.build("llama").train()
    weights = tiny.snapshot(model)
    preprocess.preprocess(model, CordaConfig(r=4, split=split), tiny.batches(), progress=False)
    assert hooks_of(model) == 0
    assert model.training
    assert all(torch.equal(weights[n], t) for n, t in model.state_dict().items())


def test_blocks_that_share_weights_are_refused():
    model = tiny.build("llama")
    model.model.layers[1] = model.model.layers[0]
    steps = lockstep(model, [model.model.layers[0]], tiny.batches(), to_end=True)
    next(steps)[1]()
    with pytest.raises(RuntimeError, match="run twice"):
        next(steps)
    assert hooks_of(model) == 0


# --- what the activations may not be ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_activations_name_layer_and_sample(value):
    model, batches = tiny.build("llama"), tiny.batches()
    bad = int(batches[1]["input_ids"][1, 3])  # the fifth sample
    for i, batch in enumerate(batches):
        others = batch["input_ids"] == bad
        others[1] &= i != 1
        batch["input_ids"][others] = bad - 1 if bad > 3 else bad + 1
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = value
    with pytest.raises(CordaError, match=r"model\.layers\.0\.self_attn\.q_proj, sample 4 of the context"):
        preprocess.preprocess(model, CordaConfig(r=4), batches, progress=False)
    assert hooks_of(model) == 0


def test_bad_numbers_in_padding_do_not_count():
    model = tiny.build("bert")
    ids, mask = tiny.padded([4, 6], 6, seed=0)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[0] = 1e30
    model.bert.embeddings.LayerNorm.register_forward_hook(
        lambda module, args, output: output.masked_fill(mask[..., None] == 0, torch.inf)
    )
    layer = {"bert.encoder.layer.0.attention.self.query": model.bert.encoder.layer[0].attention.self.query}
    steps = list(tiny.steps(model, layer, [{"input_ids": ids, "attention_mask": mask}]))
    assert all(torch.isfinite(C).all() for _, groups in steps for _, Cs in groups for C in Cs)
    assert steps


def test_all_padding_is_refused():
    batch = {"input_ids": torch.zeros(2, 5, dtype=torch.long), "attention_mask": torch.zeros(2, 5)}
    with pytest.raises(CordaError, match="only padding: the attention masks of its 4 samples"):
        preprocess.preprocess(tiny.build("llama"), CordaConfig(r=4), [batch, batch], progress=False)


def test_an_empty_context_is_refused():
    with pytest.raises(CordaError, match="context is empty"):
        preprocess.preprocess(tiny.build("llama"), CordaConfig(r=4), [], progress=False)


def test_a_short_context_is_reported_and_works():
    model = tiny.build("llama")
    with pytest.warns(UserWarning, match=r"14 real tokens in 2 samples, fewer than .*down_proj.* \(48\).*about 7 such"):
        start = preprocess.preprocess(
            model, CordaConfig(r=4), [dict(zip(("input_ids", "attention_mask"), tiny.padded([6, 8], 8, 0)))], False
        )
    assert start.record["context"] == {"samples": 2, "tokens": 14, "widest": 48, "samples_for_full_rank": 7}
    assert all(torch.isfinite(layer.A).all() for layer in start.layers.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_prj"]}, r"'q_prj'.*matches no layer of LlamaForCausalLM; nearest names: q_proj"),
        (
            {"r": 17, "target_modules": ["k_proj"]},
            r"r is 17, but model\.layers\.0\.self_attn\.k_proj \(16 × 32\) has only 16 components",
        ),
        ({"target_modules": ["embed_tokens"]}, "model.embed_tokens is a Embedding; CorDA adapts linear layers only"),
    ],
)
def test_bad_targets_and_ranks_are_refused_before_the_forward(options, message):
    model = tiny.build("llama")
    model.forward = None  # so a forward would fail otherwise
    with pytest.raises(CordaError, match=message):
        preprocess.preprocess(model, CordaConfig(**{"r": 4, **options}), tiny.batches(), progress=False)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_first_tokens_left_out_of_the_covariances(family):
    """As with masks that begin later, over the same forward."""
    model, made = tiny.build(family), tiny.batches(family)
    targets = find_targets(model, "all-linear")

    def covariances(skip_tokens, layer):
        inputs = []
        hook = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
        means = tiny.covariances_of(model, targets, made, skip_tokens=skip_tokens)
        hook.remove()
        return means, inputs

    name = next(n for n in targets if n.endswith(("encoder.block.1.layer.0.SelfAttention.q", "1.self_attn.q_proj")))
    means, inputs = covariances(2, targets[name])
    rows = []
    for batch, x in zip(made, inputs):
        for mask, states in zip(batch["attention_mask"].bool(), x):
            rows.append(states[mask][2:])
    X = torch.cat(rows).double()
    assert torch.allclose(means[name].double(), X.T @ X / len(X), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(means[name], covariances(0, targets[name])[0][name])


def test_nothing_is_left_when_too_many_tokens_are_left_out():
    with pytest.raises(CordaError, match="no sample of the context has more than the 40 tokens"):
        preprocess.preprocess(tiny.build("llama"), CordaConfig(r=4, skip_tokens=40), tiny.batches(), progress=False)


def test_each_process_reads_about_as_many_bytes():
    block = find_blocks(tiny.build("llama"), ["model.layers.0.mlp.up_proj"])["model.layers.0"]
    tensors = tensors_of(block)
    for processes in (2, 3):
        readers = shared_out(tensors, processes)
        assert readers.keys() == set(tensors)
        loads = [sum(x.nbytes for x in tensors if readers[x] == number) for number in range(processes)]
        assert max(loads) - min(loads) <= max(x.nbytes for x in tensors)
