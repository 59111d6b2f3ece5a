"""`corda inspect --context`: every number against a plain float64 reference, and the page in a real browser."""

import json
import math
import re
from contextlib import contextmanager
from itertools import chain, combinations

import helpers
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from corda_lora.cli import main
from corda_lora.config import CordaError, DataConfig, InspectConfig
from corda_lora.data.batches import encode
from corda_lora.data.samples import load_others, load_rounds
from corda_lora.inspection.contexts import inspect_model
from corda_lora.report.inspected_pictures import draw_contexts
from corda_lora.report.text import number

ROWS = {
    "sums": [{"prompt": f"{i} + {i} =", "response": f" {i + i}"} for i in range(48)],
    "capitals": [{"question": f"The capital of country {i}?", "answer": f" city {i + 5}."} for i in range(48)],
}
TEMPLATES = {"sums": {}, "capitals": {"prompt": "{question}", "response": "{answer}"}}
SAMPLES, FEWER, HELD_OUT, LEVELS, ROUNDS = 12, 4, 8, (0.25, 0.45, 0.5), 3
LAMBDA = 0.01


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contexts")
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def named(folder, name):
    return f"{folder.name}/{name}"


def contexts(files, *names):
    arguments = []
    for name in names or ROWS:
        arguments += ["--context", str(files / f"{name}.jsonl")]
        for option, template in TEMPLATES[name].items():
            arguments += [f"--context.{option}", template]
    return arguments


@pytest.fixture(scope="module")
def made(files, checkpoint, tmp_path_factory):
    output = tmp_path_factory.mktemp("inspected") / "seen"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("corda_lora.devices.accelerator", lambda: torch.device("cpu"))
        main(
            [
                *("inspect", "--model", str(checkpoint), *contexts(files), f"--samples=[{FEWER},{SAMPLES}]"),
                *(
                    f"--held_out={HELD_OUT}",
                    f"--levels=[{','.join(map(str, LEVELS))}]",
                    "--two_sided=true",
                    f"--rounds={ROUNDS}",
                ),
                *("--layers=[q_proj,1.mlp.down_proj]", "--output", str(output)),
            ]
        )
    return output


@pytest.fixture(scope="module")
def record(made):
    return json.loads((made / "inspect.json").read_text())


@pytest.fixture(scope="module")
def model(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def encoded(files, tokenizer, name, round=0, others=False, rounds=ROUNDS):
    data = DataConfig(str(files / f"{name}.jsonl"), samples=SAMPLES, **TEMPLATES[name])
    drawn = load_rounds(data, rounds)
    samples = drawn[round]
    if others:
        shown = [sample.row for samples in drawn for sample in samples]
        samples = load_others(data, list(chain(*drawn)), HELD_OUT)
        assert not any(sample.row in shown for sample in samples)
    return [encode(tokenizer, sample, 512) for sample in samples]


@pytest.fixture(scope="module")
def covariances(files, model, tokenizer):
    """{context: {layer: C (n, n)}}, from the inputs of one sample after the other."""
    return {name: of_round(files, model, tokenizer, name, 0) for name in ROWS}


def of_round(files, model, tokenizer, name, round):
    rows, hooks = {}, []
    for layer, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and layer != "lm_head":
            keep = rows.setdefault(layer, [])
            hear = lambda _, args, keep=keep: keep.append(args[0][0].double())  # noqa: E731
            hooks.append(module.register_forward_pre_hook(hear))
    with torch.no_grad():
        for e in encoded(files, tokenizer, name, round):
            model(torch.tensor([e.ids]))
    for hook in hooks:
        hook.remove()
    return {layer: (X := torch.cat(parts)).T @ X / len(X) for layer, parts in rows.items()}


def regular(C):
    return C + LAMBDA * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)


def oriented(W, way, C):
    return W if way == "plain SVD" else W * regular(C).diagonal().sqrt() if way == "ASVD" else W @ regular(C)


def test_the_files(made):
    figures = ("truncation", "spectra", "covariances", "similarity", "compactness")
    names = {
        "report.html",
        "inspect.json",
        "inspect.safetensors",
        *(f"{n}.{k}" for n in figures for k in ("png", "svg")),
    }
    assert {path.name for path in made.iterdir()} == names
    modes = {path.name: path.stat().st_mode & 0o777 for path in made.iterdir()}
    assert len(set(modes.values())) == 1, modes  # safetensors writes for the owner alone


def page_data(made):
    page = (made / "report.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_spectra(made, files, model, covariances):
    tensors, shown = load_file(made / "inspect.safetensors"), page_data(made)["spectra"]
    layers = [n for n, _ in model.named_modules() if n.endswith("q_proj") or n.endswith("1.mlp.down_proj")]
    assert list(shown) == layers
    for layer in layers:
        W = model.get_submodule(layer).weight.detach().double()
        for way, name in [("plain SVD", ""), *((way, name) for way in ("ASVD", "CO-SVD") for name in ROWS)]:
            label = f"{way}, {named(files, name)}" if name else way
            expected = torch.linalg.svdvals(oriented(W, way, covariances[name][layer] if name else None))
            torch.testing.assert_close(tensors[f"spectrum|{layer}|{label}"].double(), expected, rtol=2e-4, atol=1e-7)
            assert shown[layer][label][0] == [1, 1.0]
            for i, y in shown[layer][label]:
                assert y == pytest.approx(float(expected[i - 1] / expected[0]), rel=2e-3, abs=1e-9)


def test_compactness(record, files, model, covariances):
    for name in ROWS:
        for layer, C in covariances[name].items():
            eigenvalues = torch.linalg.eigvalsh(regular(C))
            m = model.get_submodule(layer).out_features
            pi = math.sqrt(m) * float(eigenvalues[-1] / eigenvalues[0])
            assert record["layers"][layer]["log10_pi"][named(files, name)] == pytest.approx(math.log10(pi), abs=1e-3)


def test_similarity(record, covariances):
    def cosine(a, b):
        return float((a * b).sum() / (a.norm() * b.norm()))

    layers = list(covariances["sums"])
    values = {"as_it_is": {}, "channels_at_one_scale": {}}
    for layer in layers:
        a, b = (covariances[name][layer] for name in ROWS)
        scale = sum(C.diagonal() / C.diagonal().mean() for C in (a, b)).sqrt()
        values["as_it_is"][layer] = cosine(a, b)
        values["channels_at_one_scale"][layer] = cosine(*(C / scale / scale[:, None] for C in (a, b)))
    inputs = [n for n in layers if not n.endswith(("k_proj", "v_proj", "up_proj"))]  # others share theirs
    assert record["similarity"]["inputs"] == len(inputs)
    for kind, by_layer in values.items():
        assert record["similarity"][kind][0][1] == pytest.approx(sum(map(by_layer.get, inputs)) / len(inputs), abs=1e-5)
        assert record["similarity"][kind][0][1] == record["similarity"][kind][1][0] < 0.999
        for layer in layers:
            found = record["layers"][layer]["similarity"][kind == "channels_at_one_scale"]
            assert found[0][1] == pytest.approx(by_layer[layer], abs=1e-5)


def test_covariances_are_shrunk(made, files, covariances):
    tensors = load_file(made / "inspect.safetensors")
    for name in ROWS:
        layer = "model.layers.0.self_attn.q_proj"
        cells = tensors[f"covariance|{layer}|{named(files, name)}"].double()  # 32 channels: each has its own
        torch.testing.assert_close(cells, covariances[name][layer].abs(), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def losses(model, files, tokenizer, *names, rounds=ROUNDS):
    """The mean loss over the answer tokens of what was not shown of each context."""
    found = {}
    for name in names or ROWS:
        total = count = 0.0
        for e in encoded(files, tokenizer, name, others=True, rounds=rounds):
            logits = model(torch.tensor([e.ids])).logits[0, :-1].double()
            answer = torch.tensor(e.answer[1:])
            total -= float(logits.log_softmax(-1)[answer, torch.tensor(e.ids[1:])[answer]].sum())
            count += int(answer.sum())
        found[named(files, name)] = total / count
    return found


def test_a_level_loses_what_a_model_loses_whose_weights_were_cut(record, files, model, tokenizer, covariances):
    cut = record["truncation"]
    assert cut["levels"] == sorted(LEVELS)
    for text, loss in losses(model, files, tokenizer).items():
        assert cut["base"][text] == pytest.approx(loss, abs=1e-5)
    curves = {curve["label"]: curve for curve in cut["curves"]}
    assert len(curves) == 1 + 2 * 6  # plain; ASVD, CO-SVD, with fewer samples, two-sided, +, ++
    whole = {n: m.weight.detach().clone() for n, m in model.named_modules() if n in covariances["sums"]}
    try:
        for way, name in [("plain SVD", ""), ("ASVD", "capitals"), ("CO-SVD", "sums"), ("CO-SVD", "capitals")]:
            for number, level in enumerate(cut["levels"]):
                for layer, W in whole.items():
                    W = W.double()
                    U = torch.linalg.svd(oriented(W, way, covariances[name][layer] if name else None))[0]
                    R = min(W.shape)
                    k = round(level * R)
                    tail = U[:, R - k : R]
                    model.get_submodule(layer).weight.data = (W - tail @ (tail.T @ W)).float()
                label = f"{way}, {named(files, name)}" if name else way
                for text, loss in losses(model, files, tokenizer).items():
                    assert curves[label]["loss"][text][number] == pytest.approx(loss, abs=2e-4), (label, level)
    finally:
        for layer, W in whole.items():
            model.get_submodule(layer).weight.data = W


def test_selected_and_allocated(record, files, model, tokenizer, covariances):
    """CO-SVD+ takes the covariance of Algorithm 1, CO-SVD++ discards what Algorithm 2 filters."""
    curves = {curve["label"]: curve for curve in record["truncation"]["curves"]}
    whole = {n: m.weight.detach().clone() for n, m in model.named_modules() if n in covariances["sums"]}
    name, level = "capitals", 2  # half of the components
    of_rounds = [of_round(files, model, tokenizer, name, i) for i in range(ROUNDS)]
    U, spectra, log_pis = {}, [], []
    for layer, W in whole.items():
        Cs = [C[layer] for C in of_rounds]
        C = Cs[helpers.literal_selection(W, Cs)[0]]
        U[layer], sigma, _ = torch.linalg.svd(W.double() @ regular(C), full_matrices=False)
        eigenvalues = torch.linalg.eigvalsh(regular(C))
        spectra.append(sigma)
        log_pis.append(math.log(math.sqrt(len(W)) * float(eigenvalues[-1] / eigenvalues[0])))
    costs = [sum(W.shape) for W in whole.values()]
    even = [round(0.5 * min(W.shape)) for W in whole.values()]
    budget = sum(k * cost for k, cost in zip(even, costs))
    shared = helpers.literal_allocation(spectra, log_pis, costs, budget, "kpm")
    assert len(set(shared)) > 3
    assert budget - max(costs) < sum(k * cost for k, cost in zip(shared, costs)) <= budget
    try:
        for label, counts in (("CO-SVD+", even), ("CO-SVD++", shared)):
            for (layer, W), k in zip(whole.items(), counts):
                tail = U[layer][:, len(U[layer][0]) - k :]
                model.get_submodule(layer).weight.data = (W.double() - tail @ (tail.T @ W.double())).float()
            for text, loss in losses(model, files, tokenizer).items():
                found = curves[f"{label}, {named(files, name)}"]["loss"][text][level]
                assert found == pytest.approx(loss, abs=2e-4), label
    finally:
        for layer, W in whole.items():
            model.get_submodule(layer).weight.data = W


def test_what_is_drawn_is_what_was_found(made, record):
    """Each curve, by its name: swapped curves are found out."""
    shown = page_data(made)["truncation"]
    for curve in record["truncation"]["curves"]:
        for text, values in curve["loss"].items():
            expected = [math.exp(x) for x in (record["truncation"]["base"][text], *values)]
            assert [y for _, y, _ in shown[text][curve["label"]]] == pytest.approx(expected)
    first = re.search("<h1>(.*?)</h1>", (made / "report.html").read_text(encoding="utf-8"))[1]
    text, curves = next(iter(shown)), shown[next(iter(shown))]
    for way in ("plain SVD", "ASVD", "CO-SVD", "two-sided"):
        best = min(points[-1][1] for label, points in curves.items() if label.split(",")[0] == way)
        assert f"{number(best)} by {way}" in first, (way, text)
    for a, b in combinations(record["truncation"]["curves"], 2):
        assert a["loss"] != b["loss"], (a["label"], b["label"])


def test_pictures_have_every_curve_by_its_name(made, record, monkeypatch):
    from corda_lora.report import inspected_pictures

    figures = {}
    monkeypatch.setattr(inspected_pictures, "save_picture", lambda figure, path: figures.update({path.name: figure}))
    monkeypatch.setattr(inspected_pictures, "write_picture", lambda figure, path: figures.update({path.name: figure}))
    spectra, maps = {}, {}
    for key, tensor in load_file(made / "inspect.safetensors").items():
        kind, layer, name = key.split("|")
        (spectra if kind == "spectrum" else maps).setdefault(layer, {})[name] = tensor
    inspected_pictures.draw_contexts(made, record, spectra, maps)
    for name, figure in figures.items():
        figure.canvas.draw()
        for ax in figure.axes:
            numbers = [text.get_text() for text in ax.get_yticklabels() if text.get_text()]
            assert not any("$" in text for text in numbers), (name, numbers)
            assert name != "truncation" or len(numbers) > 1
    assert [text.get_text() for text in figures["compactness"].axes[0].get_xticklabels()] == ["0", "1"]
    for ax in figures["truncation"].axes:
        lines = {line.get_label(): list(line.get_ydata()) for line in ax.lines}
        for curve in record["truncation"]["curves"]:
            assert lines[curve["label"]][1:] == pytest.approx([math.exp(x) for x in curve["loss"][ax.get_title()]])
    for ax in figures["spectra"].axes:
        for line in ax.lines:
            sigma = spectra[ax.get_title()][line.get_label()]
            assert float(line.get_ydata()[1]) == pytest.approx(float(sigma[1] / sigma[0]), rel=2e-3)


# --- what can be wrong


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as error:
        main(["inspect", *map(str, arguments)])
    assert error.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("corda inspect: "), said
    assert not any("inspecting" in line for line in said), "long work had begun"
    return said[-1]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--layers=[q_porj]"], "there is no layer 'q_porj'; nearest names: q_proj"),
        (
            ["--layers=layers.7.self_attn.q_proj"],
            r"there is no layer 'layers.7.*nearest names: .*layers\.[01]\.self_attn",
        ),
        (
            ["--levels=17"],
            "level 17 discards more components than model.layers.0.self_attn.k_proj has, 16: give shares",
        ),
        (["--levels=2.5"], "a level is 2.5, but must be a share below 1, or a whole number"),
        (["--levels=0.5", "--samples=48"], "all samples of .*sums.jsonl are shown, and none is left to measure on"),
        (
            ["--levels=[0.5,1.0]"],
            "levels are shares below 1 or counts of components, not both: 0.5 is a share, 1 a count",
        ),
        (["--levels=0.001"], "level 0.001 discards no component: the widest layer has 32"),
        (["--two_sided=true"], "two_sided is of the components that levels discard"),
        (["--text=text.txt"], "text is of the components that levels discard"),
    ],
)
def test_bad_options(options, sentence, checkpoint, files, tmp_path, capsys):
    said = refused(
        capsys, "--model", checkpoint, *contexts(files), "--samples=12", *options, "--output", tmp_path / "seen"
    )
    assert re.search(sentence, said), said
    assert not (tmp_path / "seen").exists()


def test_contexts_with_other_columns(checkpoint, files, tmp_path, capsys):
    both = [f"--context={files / name}.jsonl" for name in ROWS]
    said = refused(
        capsys,
        "--model",
        checkpoint,
        *both,
        "--prompt={question}",
        "--response={answer}",
        "--output",
        tmp_path / "seen",
    )
    assert "sums.jsonl" in said
    assert "question" in said
    assert "prompt" in said


def test_a_page_that_would_be_too_large(checkpoint, files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("corda_lora.report.inspected.LARGEST_PAGE", 50_000)
    arguments = ["--model", checkpoint, *contexts(files), "--layers=[q_proj,k_proj]", "--output", tmp_path / "seen"]
    said = refused(capsys, *arguments)
    assert "about 0 MB, for 4 layers with 5 spectra and 2 covariances each: leave some --layers out" in said
    assert "so that at most 2 are shown" in said
    # Fewer samples, the two-sided metric and several rounds have spectra of their own.
    monkeypatch.setattr("corda_lora.report.inspected.LARGEST_PAGE", 150_000)
    more = [f"--samples=[{FEWER},{SAMPLES}]", "--levels=0.5", "--two_sided=true", f"--rounds={ROUNDS}"]
    said = refused(capsys, *arguments, f"--held_out={HELD_OUT}", *more)
    assert "for 4 layers with 11 spectra and 2 covariances each" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("name", ["data/gsm8k_train", "an ability with a name of many words " * 3])
def test_names_fit_into_pictures(name, tmp_path):
    """They were cut off at the left, and long ones left no room for what they name."""
    layer, names = "model.language_model.layers.1.self_attn.q_proj", [name, "nq_context"]
    about = {"block": "model.language_model.layers.1", "kind": "self_attn.q_proj"}
    losses = {"label": f"CO-SVD, {name}", "loss": {name: [2.0, 3.0]}}
    record = {
        "layers": {layer: about | {"log10_pi": dict.fromkeys(names, 5.0)}},
        "similarity": {"contexts": names, "channels_at_one_scale": [[1.0, 0.5], [0.5, 1.0]]},
        "truncation": {"levels": [0.1, 0.2], "base": {name: 1.0}, "curves": [losses]},
    }
    spectra = {layer: {f"CO-SVD, {name}": torch.tensor([1.0, 0.1, 0.01])}}
    draw_contexts(tmp_path, record, spectra, {layer: dict.fromkeys(names, torch.rand(48, 48))})
    pictures = sorted(tmp_path.glob("*.png"))
    assert [p.stem for p in pictures] == ["compactness", "covariances", "similarity", "spectra", "truncation"]
    for path in pictures:
        dark = np.asarray(Image.open(path).convert("L")) < 250
        assert not any(edge.any() for edge in (dark[0], dark[-1], dark[:, 0], dark[:, -1])), path.stem
        assert dark.any(1).sum() > 200


def test_a_sample_is_cut_at_max_length_however_its_data_is_given(files):
    """Several contexts, or one with options, come as `DataConfig`s, whose own length was taken."""
    given = [str(files / "sums.jsonl"), DataConfig("a.csv", prompt="{x}"), DataConfig("b.csv", max_length=7)]
    config = InspectConfig(given, max_length=5, levels=0.5, text=DataConfig("text.txt"))
    assert [data.max_length for data in config.contexts()] == [5, 5, 7]
    assert config.running_text().max_length == 5


def test_the_command_cuts_each_context_and_names_it(checkpoint, files, tmp_path, capsys, undrawn):
    output = tmp_path / "seen"
    arguments = ["--model", checkpoint, *contexts(files), "--samples=2", "--max_length=5", "--output", output]
    main(["inspect", *map(str, arguments)])
    record = json.loads((output / "inspect.json").read_text())
    assert [context["tokens"] for context in record["contexts"]] == [10, 10]
    said = " ".join(capsys.readouterr().err.split())
    for name in ROWS:  # a note of low rank says which context has it
        assert f"{named(files, name)} has 10 real tokens in 2 samples" in said


def test_a_model_without_a_context(checkpoint, tmp_path, capsys):
    assert "give a --model and a --context" in refused(capsys, "--model", checkpoint, "--output", tmp_path / "seen")


# --- in a browser

PROBE = """
<script>
const out = { width: innerWidth };
const wait = (ms = 30) => new Promise((done) => setTimeout(done, ms));
const overflow = () => document.documentElement.scrollWidth - document.documentElement.clientWidth;
(async () => {
  await wait();
  for (const details of document.querySelectorAll("details")) details.open = true;
  const clipped = (t) => { const b = t.getBoundingClientRect(), s = t.ownerSVGElement.getBoundingClientRect();
    return b.left < s.left - 1 || b.right > s.right + 1 || b.top < s.top - 1 || b.bottom > s.bottom + 1; };
  out.clipped = [...document.querySelectorAll(".chart text")].filter(clipped).map((t) => t.textContent);
  out.hidden = [...document.querySelectorAll("section[hidden]")].map((s) => s.id);
  const scales = document.querySelector("#truncation svg").querySelectorAll("text");
  out.numbers = [...scales].filter((t) => t.getAttribute("text-anchor") === "end" && isFinite(t.textContent)).length;
  const lines = (host) => document.querySelectorAll(host + " polyline").length;
  out.lines = [lines("#truncation"), lines("#spectra")];
  document.querySelector("#truncation + .legend button").click();
  out.lines.push(lines("#truncation"), lines("#spectra"));
  document.querySelector("#truncation + .legend button").click();
  const [select, other] = document.querySelectorAll("select.layer");
  out.layers = select.options.length;
  select.selectedIndex = 1;
  select.onchange();
  out.same = other.value === select.value;
  const canvas = [...document.querySelectorAll("#covariances canvas")];
  out.canvases = canvas.map((c) => new Set(c.getContext("2d").getImageData(0, 0, c.width, c.height).data).size > 8);
  out.cells = document.querySelectorAll("#compactness rect.cell").length;
  const cell = document.querySelector("#compactness rect.cell").getBoundingClientRect();
  const at = { clientX: cell.left + cell.width / 2, clientY: cell.top + cell.height / 2 };
  document.querySelector("#compactness svg").dispatchEvent(new PointerEvent("pointermove", at));
  out.tip = document.querySelector("#compactness .tip:not([hidden])").textContent;
  out.overflow = overflow();
  parent.postMessage(JSON.stringify(out), "*");
})();
</script></body>"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_in_a_browser(theme, made, tmp_path):
    page = (made / "report.html").read_text(encoding="utf-8")
    assert "{{" not in page
    assert not re.search(r"(?:src|href)=\"(?!data:,)|@import|url\((?!#)|fetch\(|XMLHttpRequest", page)
    seen = helpers.browse(page, PROBE, tmp_path, theme)
    assert seen["console"] == []
    assert [found["width"] for found in seen["pages"]] == [1280, 390]
    for found in seen["pages"]:
        assert (found["overflow"], found["clipped"], found["hidden"]) == (0, [], ["change-card"])
        assert found["lines"] == [13, 11, 12, 10]
        assert found["numbers"] > 2  # on an axis that is no decade long
        assert found["layers"] == 3
        assert found["same"]
        assert found["canvases"] == [True, True]
        assert found["cells"] == 14
        assert re.fullmatch(r"model\.layers\.0\.self_attn\.q_proj\d\.\d+", found["tip"])


LONG = """
<script>
(async () => {
  await new Promise((done) => setTimeout(done, 30));
  for (const details of document.querySelectorAll("details")) details.open = true;
  const out = { width: innerWidth };
  out.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  out.beyond = [...document.querySelectorAll("tbody th")].filter((t) => t.scrollWidth > t.clientWidth).length;
  parent.postMessage(JSON.stringify(out), "*");
})();
</script></body>"""


@pytest.mark.parametrize("names", ["contexts", "layers"])
def test_long_names_stay_inside_the_page(names, made, files, tmp_path):
    page = (made / "report.html").read_text(encoding="utf-8")
    long = {
        "contexts": (named(files, "sums"), "s" * 90),
        "layers": ("model.layers.", "a_model.of.vision_and.language." * 3),
    }
    seen = helpers.browse(page.replace(*long[names]), LONG, tmp_path, "light")
    assert seen["pages"] == [{"width": 1280, "overflow": 0, "beyond": 0}, {"width": 390, "overflow": 0, "beyond": 0}]


# --- other families


@pytest.mark.parametrize(("family", "level"), [("gpt2_conv1d", 32), ("gemma2", 0.999), ("mixtral", 0.999)])
def test_truncation_of_other_families(family, level, files, tokenizer):
    """The whole weights, and all components discarded: each layer's weight is then zero. The model is as it was."""
    model = tiny.build(family)
    before = tiny.snapshot(model)
    config = InspectConfig(context=str(files / "sums.jsonl"), samples=12, held_out=8, levels=[level])
    record = inspect_model(model, tokenizer, config, progress=False).record
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    (text,) = losses(model, files, tokenizer, "sums", rounds=1).items()
    assert record["truncation"]["base"][text[0]] == pytest.approx(text[1], abs=1e-4)
    for name in record["layers"]:
        model.get_submodule(name).weight.data.zero_()
    (text,) = losses(model, files, tokenizer, "sums", rounds=1).items()
    for curve in record["truncation"]["curves"]:
        assert curve["loss"][text[0]][0] == pytest.approx(text[1], abs=2e-3)


@pytest.mark.parametrize("family", ["bert", "t5", "deepseek_v2", "opt"])
def test_spectra_of_other_families(family, files, tokenizer, monkeypatch):
    steps = []

    @contextmanager
    def counted(_, total, __):
        yield lambda: steps.append(total)

    monkeypatch.setattr("corda_lora.inspection.contexts.progress_bar", counted)
    config = InspectConfig(context=[str(files / "sums.jsonl")], samples=12)
    found = inspect_model(tiny.build(family), tokenizer, config, progress=False)
    assert len(steps) == steps[0]  # also where layers are outside of the blocks
    assert set(found.spectra) <= set(found.record["layers"])
    assert all(
        set(by) == {"plain SVD", *(f"{way}, {named(files, 'sums')}" for way in ("ASVD", "CO-SVD"))}
        for by in found.spectra.values()
    )


def test_only_causal_models_are_truncated(files, tokenizer):
    config = InspectConfig(context=str(files / "sums.jsonl"), levels=[0.5])
    with pytest.raises(CordaError, match="no causal language model"):
        inspect_model(tiny.build("bert"), tokenizer, config, progress=False)


def test_parked_states_change_nothing(files, tokenizer, tmp_path):
    contexts = [str(files / "sums.jsonl"), {"data": str(files / "capitals.jsonl"), **TEMPLATES["capitals"]}]
    records = []
    for park in ("device", "disk"):
        datas = [DataConfig(**data) if isinstance(data, dict) else data for data in contexts]
        options = {"samples": 12, "levels": [0.25, 0.5], "rounds": 2, "two_sided": True, "batch_tokens": 40}
        config = InspectConfig(context=datas, park=park, **options)
        found = inspect_model(tiny.build("llama"), tokenizer, config, work=tmp_path, progress=False)
        records.append(found.record)
    assert records[0] == records[1]
    assert not list(tmp_path.iterdir())
