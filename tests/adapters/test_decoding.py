"""Ranks while decoding against a model that runs each token by itself, at a rank that is worked out by hand."""

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from helpers import deltas, same
from peft import LoraConfig, PeftModel, get_peft_model

from corda_lora import CordaError
from corda_lora.adapters.decoding import DecodingRanks, by_entropy, decoding_ranks, falling, fixed
from corda_lora.adapters.export import export_lora, export_ordered
from corda_lora.adapters.lora import lora_layers
from corda_lora.adapters.order import Order, nested_order, read_order
from corda_lora.algebra.order import needed_ranks
from corda_lora.methods import dylora
from corda_lora.models.weights import weight_shape
from corda_lora.preprocess.statistics import answered_batches, collect_sides, tokens_and_answers

IDS = torch.tensor([[0, 0, 5, 9, 33], [7, 8, 20, 4, 61], [0, 3, 3, 80, 12]])
INPUTS = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}
NEW = 9


def adapted(family="llama", dtype=torch.float32, std=0.3, **options):
    """A tiny model with a LoRA that is far from zero, of layers of several ranks."""
    model = tiny.build(family, dtype)
    torch.manual_seed(2)
    options = {"r": 6, "lora_alpha": 9, "rank_pattern": {"down_proj": 3}, "target_modules": "all-linear"} | options
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options)).to(dtype).eval()
    with torch.no_grad():
        for layer in lora_layers(peft_model).values():
            layer.lora_B["default"].weight.normal_(std=std)
    return peft_model


def some_order(peft_model, seed=5):
    draw = torch.Generator().manual_seed(seed)
    layers = lora_layers(peft_model)
    gains = [torch.rand(layer.r["default"], generator=draw).sort(descending=True).values for layer in layers.values()]
    needs = needed_ranks(gains, [sum(weight_shape(layer.get_base_layer())) for layer in layers.values()])
    return Order(dict(zip(layers, needs)))


def generate(peft_model, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, "min_new_tokens": NEW, "pad_token_id": 0} | options
    return peft_model.generate(**INPUTS, output_logits=True, return_dict_in_generate=True, **options)


WHOLE = [fixed(1.0), falling(1.0, 4), by_entropy(torch.ones_like)]


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2_conv1d", "gemma2", "qwen3"])
@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}], ids=["greedy", "drawn", "beams"])
def test_the_whole_rank_is_plain_decoding_to_the_bit(options, family, cache):
    peft_model = adapted(family, rank_pattern={})
    torch.manual_seed(0)
    plain = generate(peft_model, use_cache=cache, **options)
    for order in (some_order(peft_model), nested_order(peft_model)):
        for rule in WHOLE:
            with decoding_ranks(peft_model, order, rule) as ranks:
                torch.manual_seed(0)
                found = generate(peft_model, use_cache=cache, **options)
            assert torch.equal(found.sequences, plain.sequences)
            assert all(torch.equal(a, b) for a, b in zip(found.logits, plain.logits, strict=True))
            assert torch.stack(ranks.history).tolist() == [[order.full] * len(plain.logits[0])] * (NEW - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_at_the_whole_rank_is_plain_to_the_bit_beside_others_that_are_not(dtype):
    peft_model = adapted(dtype=dtype)
    order = some_order(peft_model)
    plain = generate(peft_model)
    with decoding_ranks(
        peft_model, order, lambda t, logits: 1.0 if logits is None else torch.tensor([1.0, 0.3, 1.0])
    ) as ranks:
        found = generate(peft_model)
    for row in (0, 2):
        assert torch.equal(found.sequences[row], plain.sequences[row])
        assert all(torch.equal(a[row], b[row]) for a, b in zip(found.logits, plain.logits))
    assert not torch.equal(found.logits[-1][1], plain.logits[-1][1])
    assert ranks.history[0].tolist() == pytest.approx([order.full, 0.3 * order.full, order.full])


def by_hand(peft_model, ids, order, share, forced=None):
    """Decoding of one text, greedy or `forced`, without a cache or a hook of ours: for each token, the components that
    it is run with are added up. `share`: of the number of a token and the distribution it was chosen from."""
    layers, R_of = lora_layers(peft_model), [order.full * share(0, None)] * len(ids)
    ids, logits = list(ids), []

    def add(name, layer, module, args, output):
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        output = output.clone()
        for position, R in enumerate(R_of):
            r, scale = int((order.needs[name] <= R + 1e-6).sum()), layer.scaling["default"]
            scale *= len(A) / max(r, 1) if order.nested else 1
            output[0, position] += scale * B[:, :r] @ (A[:r] @ args[0][0, position])
        return output

    for step in range(NEW):
        hooks = [
            layer.get_base_layer().register_forward_hook(
                lambda *given, name=name, layer=layer: add(name, layer, *given)
            )
            for name, layer in layers.items()
        ]
        with torch.no_grad(), peft_model.disable_adapter():
            logits.append(peft_model(torch.tensor([ids])).logits[0, -1])
        for hook in hooks:
            hook.remove()
        ids.append(int(logits[-1].argmax()) if forced is None else forced[len(ids)])
        R_of.append(order.full * share(step + 1, logits[-1].softmax(-1)))
    return ids, torch.stack(logits), R_of[-NEW:-1]


def entropy_share(t, p):
    return 1.0 if p is None else float(0.5 - 0.5 * torch.sin(20 * (p * p.log()).sum()))


RULES = {
    "entropy": (by_entropy(lambda H: 0.5 + 0.5 * torch.sin(20 * H)), entropy_share),
    "falling": (falling(0.1, 6), lambda t, p: 1 - 0.9 * min(t / 6, 1)),
    "fixed": (fixed(0.35), lambda t, p: 0.35),
}


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("kind", ["shared", "nested"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", ["llama", "gpt2_conv1d"])
def test_a_batch_is_each_text_by_hand(family, rule, kind, cache):
    pattern = {} if kind == "nested" or family != "llama" else {"down_proj": 3}
    peft_model = adapted(family, torch.float64, rank_pattern=pattern)
    order = nested_order(peft_model) if kind == "nested" else some_order(peft_model)
    with decoding_ranks(peft_model, order, RULES[rule][0]) as ranks:
        found = generate(peft_model, use_cache=cache)
    for row, prompt in enumerate(IDS):
        ids, logits, budgets = by_hand(peft_model, prompt[prompt > 0].tolist(), order, RULES[rule][1])
        assert ids == found.sequences[row][int((prompt == 0).sum()) :].tolist()
        torch.testing.assert_close(torch.stack([x[row] for x in found.logits]).double(), logits, rtol=0, atol=1e-4)
        assert [float(R[row]) for R in ranks.history] == pytest.approx(budgets, abs=2e-3)
    if rule == "entropy":  # it hangs on the text
        assert len({round(float(R), 3) for step in ranks.history for R in step}) > 2 * NEW


@pytest.mark.parametrize("cache", [True, False])
def test_beams_take_their_ranks_with_them(cache):
    """The rank of a token hangs on what its own beam predicted, wherever the beam stands now."""
    peft_model = adapted(dtype=torch.float64, std=1.0)
    order = some_order(peft_model)
    with decoding_ranks(peft_model, order, RULES["entropy"][0]):
        found = generate(peft_model, use_cache=cache, num_beams=3, num_return_sequences=3, output_scores=True)
    for row, ids in enumerate(found.sequences):
        prompt = IDS[row // 3]
        forced, total = ids[int((prompt == 0).sum()) :].tolist(), 0.0
        logits = by_hand(peft_model, prompt[prompt > 0].tolist(), order, RULES["entropy"][1], forced)[1]
        for t, token in enumerate(forced[-NEW:]):
            total += float(logits[t].log_softmax(-1)[token])
        assert float(found.sequences_scores[row]) == pytest.approx(total / NEW, abs=1e-5)


# --- adapters that are put in order ----------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A LoRA on disk, and the model it is for."""
    peft_model = adapted()
    peft_model.save_pretrained(str(tmp_path / "a"))
    moved = tiny.logits(peft_model)
    return peft_model.unload(), tmp_path / "a", moved


def test_an_adapter_in_order_is_the_same_adapter_and_each_prefix_its_best(saved, tmp_path):
    model, folder, moved = saved
    tuned = PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
    layers = lora_layers(tuned)
    batches = answered_batches(tiny.answered(), 0)
    tokens, answers = tokens_and_answers(batches)
    targets = {name: layer.get_base_layer() for name, layer in layers.items()}
    sides = {
        name: (C, Ds[name])
        for members, C, Ds in collect_sides(tuned.get_base_model(), targets, batches, progress=False)
        for name in members
    }
    whole, exact = deltas(tuned), {}
    for name, (C, D) in sides.items():
        half_C, half_D = (torch.linalg.cholesky(_regular(M)) for M in (C, D))
        exact[name] = torch.linalg.svdvals(half_D.T @ whole[name] @ half_C)[: layers[name].r["default"]].square()
    gains = export_ordered(copy.deepcopy(model), folder, tmp_path / "ordered", tiny.answered(), 0, progress=False)
    found = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ordered")
    same(tiny.logits(found), moved)
    for name, gain in gains.items():
        torch.testing.assert_close(gain, 0.5 * tokens / answers * exact[name], rtol=1e-3, atol=1e-6 * float(gain[0]))
        torch.testing.assert_close(deltas(found)[name], whole[name], rtol=0, atol=1e-5)
    order = read_order(tmp_path / "ordered")
    costs = {name: sum(weight_shape(module)) for name, module in targets.items()}
    assert order.full == pytest.approx(
        sum(layers[n].r["default"] * cost for n, cost in costs.items()) / sum(costs.values())
    )
    assert {name: len(needs) for name, needs in order.needs.items()} == {n: len(gain) for n, gain in gains.items()}


def _regular(M, damping=0.01):
    M = M.double()
    return M + damping * M.diagonal().mean() * torch.eye(len(M), dtype=M.dtype)


@pytest.mark.parametrize("R", [1, 3, 4])
def test_a_static_export_is_the_fixed_rank(R, saved, tmp_path):
    model, folder, moved = saved
    export_ordered(copy.deepcopy(model), folder, tmp_path / "ordered", tiny.answered(), 0, progress=False)
    order = read_order(tmp_path / "ordered")
    assert min(order.ranks(1).values()) == 0  # a layer that has none is exported, too
    export_lora(copy.deepcopy(model), tmp_path / "ordered", tmp_path / "static", r=R)
    static = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "static").eval()
    ranks = {name: layer.r["default"] for name, layer in lora_layers(static).items()}
    assert ranks == {name: max(1, r) for name, r in order.ranks(R).items()}
    plain = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ordered").eval()
    with decoding_ranks(plain, order, fixed(R / order.full)):
        cut = tiny.logits(plain)
    same(tiny.logits(static), cut)
    assert (cut - moved).abs().max() > 0.02
    same(tiny.logits(plain), moved)  # nothing is left behind


def test_a_nested_adapter_is_scaled_as_it_was_trained():
    model, _ = dylora.install(tiny.build("llama"), LoraConfig(r=6, lora_alpha=3, target_modules="all-linear",
                                                              task_type="CAUSAL_LM"))  # fmt: skip
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in lora_layers(model.eval()).values():
            layer.lora_B["default"].weight.normal_(std=0.3)
    with decoding_ranks(model, nested_order(model), fixed(2 / 6)):
        cut = tiny.logits(model)
    same(cut, tiny.logits(dylora.truncate(model, 2)))


def test_an_adapter_trained_since_is_not_in_order(saved, tmp_path):
    model, folder, _ = saved
    with pytest.raises(CordaError, match="has no order of its components: `corda export --as ordered`"):
        read_order(folder)
    export_ordered(copy.deepcopy(model), folder, tmp_path / "ordered", tiny.answered(), 0, progress=False)
    peft_model = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ordered")
    with torch.no_grad():
        next(iter(lora_layers(peft_model).values())).lora_B["default"].weight.add_(1)
    peft_model.save_pretrained(str(tmp_path / "ordered"))
    with pytest.raises(CordaError, match="is not of the weights beside it, which were trained or changed since"):
        read_order(tmp_path / "ordered")
    (tmp_path / "ordered" / "order.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CordaError, match="is damaged, or holds no order"):
        read_order(tmp_path / "ordered")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_another_adapter_of_these_ranks_is_refused(saved, tmp_path, dtype):
    model, folder, _ = saved
    model = model.to(dtype)
    export_ordered(copy.deepcopy(model), folder, tmp_path / "ordered", tiny.answered(), 0, progress=False)
    order = read_order(tmp_path / "ordered")
    whole = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ordered").to(dtype)
    with decoding_ranks(whole, order, fixed(0.5)):
        pass
    before = PeftModel.from_pretrained(copy.deepcopy(model), folder)  # the same function in another basis
    said = "the order is of another adapter than 'default' in the model, or of this one before it was changed"
    with pytest.raises(CordaError, match=said), decoding_ranks(before, order, fixed(0.5)):
        pass


def test_too_few_samples_are_refused(saved, tmp_path):
    model, folder, _ = saved
    with pytest.raises(CordaError, match="the context has 3 samples with a response"):
        export_ordered(model, folder, tmp_path / "ordered", tiny.answered(3), 0, progress=False)
    assert not (tmp_path / "ordered").exists()


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: by_entropy(lambda H: H / 4), r"φ\(4.01\) is 1.0025, but a share of the rank is between 0 and 1"),
        (lambda: by_entropy(lambda H: H.log()), r"φ\(0.00\) is -inf"),
        (lambda: by_entropy(lambda H: H * torch.nan), r"φ\(0.00\) is nan"),
        (lambda: falling(1.5, 3), "least is 1.5"),
        (lambda: falling(0.5, 0), "tokens is 0, but the rank falls over at least one"),
        (lambda: fixed(-0.1), "the share is -0.1"),
    ],
)
def test_shares_that_leave_the_unit_interval_are_refused(make, said):
    with pytest.raises(CordaError, match=said):
        make()


def on_an_embedding():
    return get_peft_model(tiny.build("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens"]))


def test_adapters_that_have_no_prefixes_are_refused():
    peft_model = adapted()
    order = some_order(peft_model)

    def refused(model, said, order=order, adapter="default"):
        with pytest.raises(CordaError, match=said), decoding_ranks(model, order, fixed(0.5), adapter):
            pass

    refused(adapted(r=5), "the order is of another adapter")
    refused(peft_model, "the model has no active adapter 'other'", adapter="other")
    refused(adapted(use_dora=True), "the adapter is no plain LoRA")
    refused(on_an_embedding(), "the adapter is no plain LoRA of linear layers")
    refused(adapted("t5", rank_pattern={}), "is no causal language model")
    peft_model.merge_adapter()
    refused(peft_model, "the adapter is merged into the weights")
    peft_model.unmerge_adapter()
    with decoding_ranks(peft_model, order, fixed(0.5)), pytest.raises(CordaError, match="a cache that grows"):
        generate(peft_model, cache_implementation="static")


def test_tokens_that_come_without_their_samples():
    """Some models give a layer all tokens in one row, experts some of them."""
    order = Order({"experts": torch.tensor([1.0, 2.0, 3.0, 4.0])})
    ranks = DecodingRanks(order, lambda t, logits: 1.0 if logits is None else torch.tensor([0.25, 0.5]))
    text = {"input_ids": torch.ones(2, 3, dtype=torch.long)}
    ranks.before(None, (), text)
    assert ranks.cut("experts", None, (), torch.ones(4, 4)) is None  # the prompt
    ranks.after(None, (), SimpleNamespace(logits=torch.zeros(2, 3, 9)))
    ranks.before(None, (), {"input_ids": torch.ones(2, 4, dtype=torch.long)})
    expected = torch.tensor([[1.0, 1, 1, 1]] * 3 + [[1, 0, 0, 0]] + [[1, 1, 1, 1]] * 3 + [[1, 1, 0, 0]])
    assert torch.equal(ranks.cut("experts", None, (), torch.ones(8, 4)), expected)
    assert torch.equal(ranks.cut("experts", None, (), torch.ones(2, 4, 4)).flatten(0, 1), expected)
    with pytest.raises(CordaError, match="experts is not given one input for each token"):
        ranks.cut("experts", None, (), torch.ones(5, 4))


def test_fused_experts_have_no_order(tmp_path):
    peft_model = adapted("mixtral", rank_pattern={}, r=2)
    peft_model.save_pretrained(str(tmp_path / "a"))
    with pytest.raises(CordaError, match=r"experts\S* is no linear layer, whose components could be put in order"):
        export_ordered(peft_model.unload(), tmp_path / "a", tmp_path / "b", tiny.answered(), 0, progress=False)


def test_an_adapter_on_an_embedding_has_no_plain_factors(tmp_path):
    peft_model = on_an_embedding()
    peft_model.save_pretrained(str(tmp_path / "a"))
    with pytest.raises(CordaError, match="embed_tokens, which is an embedding"):
        export_ordered(peft_model.unload(), tmp_path / "a", tmp_path / "b", tiny.answered(), 0, progress=False)


def test_one_within_another_and_no_cache_is_held():
    """The outer one follows the beams of a cache, too, and is the first to do so after the inner one has ended."""
    peft_model = adapted()
    order = some_order(peft_model)
    with decoding_ranks(peft_model, order, by_entropy()) as outer:
        alone = generate(peft_model, num_beams=2).sequences
        history = outer.history
        with decoding_ranks(peft_model, order, fixed(1.0)):
            assert torch.equal(generate(peft_model, num_beams=2).sequences, alone)
        assert all(torch.equal(R, before) for R, before in zip(outer.history, history, strict=True))
        caches = weakref.WeakSet()
        for _ in range(3):
            cache = transformers.DynamicCache()
            caches.add(cache)
            generate(peft_model, past_key_values=cache)
        del cache
        gc.collect()
        assert len(caches) == 1  # the last, which may be gone on with
    gc.collect()
    assert not caches


@pytest.mark.parametrize("share", [2.0, -0.5, float("nan"), torch.tensor([0.5, 1.5, 1.0])])
def test_a_rule_of_your_own_that_leaves_the_unit_interval_is_refused(share):
    peft_model = adapted()
    rule = lambda t, logits: 1.0 if logits is None else share  # noqa: E731
    with (
        decoding_ranks(peft_model, some_order(peft_model), rule),
        pytest.raises(CordaError, match="the rule's share of token 1 is"),
    ):
        generate(peft_model)


@pytest.mark.parametrize("first", [1.0, torch.full((3,), 0.5)])
def test_shares_that_are_not_of_the_samples_are_refused(first):
    peft_model = adapted()
    rule = lambda t, logits: first if logits is None else torch.full((2,), 0.5)  # noqa: E731
    with (
        decoding_ranks(peft_model, some_order(peft_model), rule),
        pytest.raises(CordaError, match=r"share of token [01] has the shape \([23],\): give one for all samples"),
    ):
        generate(peft_model)


def test_a_share_may_be_a_whole_number_or_a_tensor_of_one():
    peft_model = adapted()
    order = some_order(peft_model)
    with decoding_ranks(peft_model, order, fixed(0.5)):
        expected = generate(peft_model).sequences
    with decoding_ranks(peft_model, order, lambda t, logits: torch.tensor(0.5)):
        assert torch.equal(generate(peft_model).sequences, expected)
    with pytest.raises(CordaError, match="as a tensor of its shape"):
        by_entropy(lambda H: 0.5)


def test_nothing_is_left_after_an_error():
    peft_model = adapted()
    before, plain = copy.deepcopy(peft_model.state_dict()), tiny.logits(peft_model)

    class StopError(Exception):
        pass

    def rule(t, logits):
        if t == 2:
            raise StopError
        return 0.5

    with pytest.raises(StopError), decoding_ranks(peft_model, some_order(peft_model), rule):
        generate(peft_model)
    assert torch.equal(tiny.logits(peft_model), plain)
    assert all(torch.equal(x, before[name]) for name, x in peft_model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in peft_model.modules())


@pytest.mark.parametrize("rule", RULES)
def test_an_output_head_is_cut_where_it_runs(rule):
    """At the last token alone, whether there is a cache or all tokens are run again."""
    peft_model = adapted(dtype=torch.float64, rank_pattern={}, target_modules=["q_proj", "lm_head"])
    found = []
    for cache in (True, False):
        with decoding_ranks(peft_model, nested_order(peft_model), RULES[rule][0]) as ranks:
            found.append((generate(peft_model, use_cache=cache), ranks.history))
    (cached, R), (whole, again) = found
    assert torch.equal(cached.sequences, whole.sequences)
    assert all(torch.allclose(a, b) for a, b in zip(R, again, strict=True))
    for row, prompt in enumerate(IDS):
        forced = cached.sequences[row][int((prompt == 0).sum()) :].tolist()  # the end of a text is held back
        order = nested_order(peft_model)
        _, logits, _ = by_hand(peft_model, prompt[prompt > 0].tolist(), order, RULES[rule][1], forced)
        torch.testing.assert_close(torch.stack([x[row] for x in cached.logits]).double(), logits, rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_entropy_is_not_that_of_another_text():
    """Two texts of one length, token by token in turn; and one that goes on from a copy of a cache."""
    peft_model = adapted()
    order, rule = some_order(peft_model), by_entropy(lambda H: 0.5 + 0.5 * torch.sin(20 * H))
    seen = []

    def recorded(t, logits):
        seen.append(logits)
        return rule(t, logits)

    def run(ids, cache):
        return peft_model(input_ids=ids, past_key_values=cache, use_cache=True)

    with decoding_ranks(peft_model, order, recorded):
        first, second = (run(ids[None, 1:], transformers.DynamicCache()) for ids in (IDS[0], IDS[1]))
        last = second.logits[:, -1].clone()
        again = copy.deepcopy(second.past_key_values)
        run(first.logits[:, -1:].argmax(-1), first.past_key_values)
        assert seen[-1] is None
        run(last.argmax(-1)[None], second.past_key_values)
        assert seen[-1] is None
        own = run(last.argmax(-1)[None], again).logits[:, -1]
        assert seen[-1] is None
        run(own.argmax(-1)[None], again)
        torch.testing.assert_close(seen[-1], own)


def test_beams_on_a_copied_cache_are_its_own():
    """A prefix's cache is filled once, and copied for each text that goes on from it."""
    peft_model = adapted()

    @torch.no_grad()
    def filled():
        cache = transformers.DynamicCache()
        peft_model(input_ids=TEXT[:, :3].expand(3, -1), past_key_values=cache, use_cache=True)
        return cache

    def beams(cache):
        options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 9, "pad_token_id": 0}
        return peft_model.generate(input_ids=TEXT, past_key_values=cache, **options)

    expected = beams(filled())
    with decoding_ranks(peft_model, some_order(peft_model), fixed(1.0)):
        prefix = filled()
        assert torch.equal(beams(copy.deepcopy(prefix)), expected)
        copied = copy.deepcopy(prefix)
    assert torch.equal(beams(copied), expected)


TEXT = torch.tensor([[5, 9, 33, 5, 9, 33, 5, 9]])


@pytest.mark.parametrize("drafts", ["lookup", "assistant"])
@pytest.mark.parametrize("number", [1, 3])
def test_the_entropy_is_that_of_the_prediction_beside_drafts(drafts, number):
    """A token that is run by itself after a draft, of which some tokens were refused, was chosen from an earlier
    prediction than the last."""
    peft_model, helper = adapted(std=0.05), tiny.build("llama")
    helper.generation_config.num_assistant_tokens = number
    helper.generation_config.assistant_confidence_threshold = 0.0
    options = {"prompt_lookup_num_tokens": number} if drafts == "lookup" else {"assistant_model": helper}
    seen, chosen = [], []
    phi = by_entropy()

    def rule(t, logits):
        if logits is not None:
            chosen.append(int(logits.argmax(-1)))
        return phi(t, logits)

    hook = peft_model.get_base_model().register_forward_pre_hook(
        lambda module, args, given: seen.append(given["input_ids"][0].tolist()), with_kwargs=True
    )
    with decoding_ranks(peft_model, some_order(peft_model), rule):
        peft_model.generate(input_ids=TEXT, max_new_tokens=40, do_sample=False, pad_token_id=0, **options)
    hook.remove()
    assert chosen
    assert chosen == [ids[0] for ids in seen if len(ids) == 1]
