"""SmolLM2-135M and a context of real sentences."""

import copy
from types import SimpleNamespace

import gguf
import pytest
import tiny
import torch
from helpers import literal_allocation, literal_selection
from tiny import start_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from corda_lora import CordaConfig
from corda_lora.adapters.lora import install
from corda_lora.data.batches import context_batches
from corda_lora.data.samples import Sample
from corda_lora.models.loading import tokenizer_of
from corda_lora.models.targets import find_targets
from corda_lora.preprocess.pipeline import preprocess

CPU = torch.device("cpu")
HARDEST = r"model\.layers\.(3|10|27)\..*_proj"  # with the largest errors, and the singular values nearest to others
LAYERS = r"model\.layers\.(0|29)\..*_proj"
FEWER = r"model\.layers\.(0\.self_attn|29\.\w+)\..*_proj"
TEXT = """The capital of France is Paris, and the capital of Japan is Tokyo.
Water is made of hydrogen and oxygen; table salt is sodium chloride.
The chemical symbol of gold is Au, that of silver is Ag and that of iron is Fe.
The Nile flows north through Egypt into the Mediterranean Sea.
Mount Everest, in the Himalayas, is the highest mountain above the sea.
Shakespeare wrote Hamlet; Cervantes wrote Don Quixote; Tolstoy wrote War and Peace.
Light travels about three hundred thousand kilometres in a second.
The currency of India is the rupee, that of Mexico the peso and that of Sweden the krona.
A spider has eight legs, an insect six, and a centipede never exactly a hundred.
The Berlin Wall fell in November of 1989, after twenty-eight years."""


@pytest.fixture(scope="module")
def model(smollm2):
    return AutoModelForCausalLM.from_pretrained(smollm2).eval()


@pytest.fixture(scope="module")
def batches(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return context_batches(tokenizer, [Sample("", line, {}) for line in TEXT.split("\n")], 64, batch_tokens=128)[0]


def test_components_of_real_layers_are_exact(model, batches):
    """BA of each kind of linear layer, both modes, against a float64 SVD: equal where S is separated, as it is in all
    210 layers, and of equal energy."""
    targets = find_targets(model, HARDEST)
    with torch.no_grad():
        for _, groups in tiny.steps(model, targets, batches):
            for name, found in [(name, Cs[0]) for members, Cs in groups for name in members]:
                W, C = targets[name].weight.double(), found.double()
                C = C + 0.01 * C.diagonal().mean() * torch.eye(len(C), dtype=torch.float64)
                U, sigma, _ = torch.linalg.svd(W @ C, full_matrices=False)
                for mode, S, border in (("ipm", slice(0, 16), 15), ("kpm", slice(len(sigma) - 16, None), -17)):
                    config = CordaConfig(mode=mode, r=16, split="balanced")
                    start = start_of(targets[name].weight, found, config)
                    BA = start.B.double() @ start.A.double()
                    assert (sigma[border] - sigma[border + 1]) / sigma[border] > 1e-4, (name, mode)
                    expected = U[:, S] @ (U[:, S].T @ W)
                    assert (BA - expected).norm() / expected.norm() < 1e-5, (name, mode)
                    assert abs((BA @ C).norm() / sigma[S].norm() - 1) < 1e-6, (name, mode)
    assert len(targets) == 21


@pytest.mark.filterwarnings("ignore:the context has")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_logits_are_the_base_models_to_the_last_bit(dtype, model, batches):
    model = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        before = model(**batches[0]).logits
        for split in ("paper", "balanced", "anchored"):
            config = CordaConfig(r=16, split=split, target_modules=LAYERS)
            adapted = install(model, preprocess(model, config, batches, progress=False))
            assert torch.equal(adapted(**batches[0]).logits, before)
            model = adapted.unload()
            assert torch.equal(model(**batches[0]).logits, before)


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:the smallest of")
def test_rounds_and_ranks_are_those_of_the_papers_loops(model, smollm2):
    """CorDA++ on eleven layers, three rounds, against Algorithms 1 and 2 written out, from float64 SVDs."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    lines = TEXT.split("\n")
    rounds = [lines[:4], lines[3:7], lines[6:]]
    batches = [context_batches(tokenizer, [Sample("", x, {}) for x in part], 64)[0][0] for part in rounds]
    targets = find_targets(model, FEWER)
    Cs = {n: Cs for _, groups in tiny.steps(model, targets, batches, rounds=[0, 1, 2]) for ns, Cs in groups for n in ns}
    chosen, spectra, log_pis, scores = {}, {}, {}, {}
    for name, module in targets.items():
        W = module.weight.detach().double()
        covariances = [C.double() for C in Cs[name]]
        chosen[name], scores[name] = literal_selection(W, covariances)
        C = covariances[chosen[name]]
        C = C + 0.01 * C.diagonal().mean() * torch.eye(len(C), dtype=torch.float64)
        eigenvalues = torch.linalg.eigvalsh(C)
        spectra[name] = torch.linalg.svdvals(W @ C)
        log_pis[name] = float((len(W) ** 0.5 * eigenvalues[-1] / eigenvalues[0]).log())
    assert len(set(chosen.values())) > 1
    for mode in ("kpm", "ipm"):
        config = CordaConfig(mode=mode, preset="corda++", rounds=3, r=16, target_modules=FEWER)
        start = preprocess(model, config, batches, progress=False)
        found = {name: layer.record for name, layer in start.layers.items()}
        assert {name: record.round for name, record in found.items()} == chosen
        for name, record in found.items():
            assert record.scores == pytest.approx(scores[name], rel=1e-5)
        costs = [sum(module.weight.shape) for module in targets.values()]
        ranks = literal_allocation(list(spectra.values()), list(log_pis.values()), costs, 16 * sum(costs), mode)
        assert [record.r for record in found.values()] == ranks
        assert len(set(ranks)) > 3
        assert start.record["totals"]["parameters"] <= 16 * sum(costs)
        assert start.record["totals"]["parameters"] > 16 * sum(costs) - max(costs)


def test_a_gguf_file_is_known_by_its_own_name_and_read_once(smollm2, gguf_file, monkeypatch):
    name = (smollm2 / "loaded_from").read_text()
    assert name == str(gguf_file)  # an adapter names it as its base
    model = SimpleNamespace(config=SimpleNamespace(name_or_path=name))
    read, begin = [], gguf.GGUFReader.__init__
    monkeypatch.setattr(gguf.GGUFReader, "__init__", lambda self, path: read.append(path) or begin(self, path))
    assert tokenizer_of(model).eos_token == "<|im_end|>"
    assert len(read) == 1
