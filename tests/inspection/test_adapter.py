"""`corda inspect --adapter`: every number against a plain float64 reference, of a LoRA of PEFT's and of CorDA's."""

import json
import math
import re

import helpers
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from corda_lora.cli import main
from corda_lora.config import DataConfig
from corda_lora.data.batches import encode
from corda_lora.data.samples import load_samples
from corda_lora.inspection.adapter import read_adapter

ROWS = [{"prompt": f"{i} + {i} =", "response": f" {i + i}"} for i in range(20)]
TEXT = [{"text": "The quick brown fox. " * 2} for _ in range(4)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, rows in (("sums", ROWS), ("text", TEXT)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def base(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def lora(checkpoint, tmp_path_factory):
    """A LoRA that PEFT made, with ranks and scales that differ."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"layers.1.mlp.down_proj": 2},
        alpha_pattern={"q_proj": 3},
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(1)
    adapted = peft.get_peft_model(base(checkpoint), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    adapted.save_pretrained(folder)
    return folder


def updates(checkpoint, adapter):
    """ΔW (m, n) of each layer, by merging."""
    before = {n: p.double() for n, p in base(checkpoint).named_parameters()}
    merged = peft.PeftModel.from_pretrained(base(checkpoint).double(), adapter).merge_and_unload()
    after = {n: p.detach() - before[n] for n, p in merged.named_parameters()}
    return {n.removesuffix(".weight"): d for n, d in after.items() if d.abs().max() > 1e-9}


def inspected(tmp_path_factory, *arguments, drawn=False):
    """The output; its pictures, a second each, are not `drawn`."""
    output = tmp_path_factory.mktemp("inspected") / "seen"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("corda_lora.devices.accelerator", lambda: torch.device("cpu"))
        if not drawn:
            patch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **options: None)
        main(["inspect", *map(str, arguments), "--output", str(output)])
    return output


@pytest.fixture(scope="module")
def made(checkpoint, lora, files, tmp_path_factory):
    contexts = [f"--context={files / name}.jsonl" for name in ("sums", "text")]
    return inspected(tmp_path_factory, "--adapter", lora, "--model", checkpoint, *contexts, drawn=True)


@pytest.fixture(scope="module")
def layers(made):
    return json.loads((made / "inspect.json").read_text())["layers"]


def test_norms_and_spectra(made, layers, checkpoint, lora):
    spectra = load_file(made / "inspect.safetensors")
    changed = updates(checkpoint, lora)
    assert list(layers) == [n for n, _ in base(checkpoint).named_modules() if n in changed]
    for name, change in changed.items():
        about = layers[name]
        assert about["r"] == (2 if name == "model.layers.1.mlp.down_proj" else 4)
        sigma = torch.linalg.svdvals(change)[: about["r"]]
        torch.testing.assert_close(spectra[f"singular values|{name}"].double(), sigma, rtol=1e-4, atol=1e-7)
        assert about["norm"] == pytest.approx(float(change.norm()), rel=1e-5)
        assert about["largest"] == pytest.approx(float(sigma[0]), rel=1e-5)
        W = base(checkpoint).get_submodule(name).weight
        assert about["relative"] == pytest.approx(float(change.norm() / W.norm()), rel=1e-5)
        assert about["rounded_away"] < 1e-4
        assert f"{about['block']}.{about['kind']}" == name


def test_how_far_the_outputs_move(layers, checkpoint, lora, files, tokenizer):
    model, changed = base(checkpoint), updates(checkpoint, lora)
    for context in ("sums", "text"):
        inputs = {name: [] for name in changed}
        hooks = [
            model.get_submodule(name).register_forward_pre_hook(lambda _, args, k=rows: k.append(args[0][0].double()))
            for name, rows in inputs.items()
        ]
        for sample in load_samples(DataConfig(str(files / f"{context}.jsonl"))):
            with torch.no_grad():
                model(torch.tensor([encode(tokenizer, sample, 512).ids]))
        for hook in hooks:
            hook.remove()
        for name, change in changed.items():
            X = torch.cat(inputs[name])
            moved = layers[name]["moved"][f"{files.name}/{context}"]
            outputs = (X @ change.T).norm() / (X @ model.get_submodule(name).weight.detach().double().T).norm()
            assert moved["outputs"] == pytest.approx(float(outputs), rel=1e-3)
            A = load_file(lora / "adapter_model.safetensors")[f"base_model.model.{name}.lora_A.weight"].double()
            assert moved["leak"] == pytest.approx(float((X @ A.T).square().sum() / len(X)), rel=1e-3)


def test_which_ability_each_component_serves(made, layers, checkpoint, lora, files, tokenizer):
    """The energy of each component's outputs alone, over that of the layer's, on each ability."""
    model, factors = base(checkpoint), load_file(lora / "adapter_model.safetensors")
    config = json.loads((lora / "adapter_config.json").read_text())
    energies = {name: {} for name in layers}
    for context in ("sums", "text"):
        inputs = {name: [] for name in layers}
        hooks = [
            model.get_submodule(name).register_forward_pre_hook(lambda _, args, k=rows: k.append(args[0][0].double()))
            for name, rows in inputs.items()
        ]
        for sample in load_samples(DataConfig(str(files / f"{context}.jsonl"))):
            with torch.no_grad():
                model(torch.tensor([encode(tokenizer, sample, 512).ids]))
        for hook in hooks:
            hook.remove()
        for name in layers:
            X, W = torch.cat(inputs[name]), model.get_submodule(name).weight.detach().double()
            A, B = (factors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
            moved = [float((X @ a[:, None] @ b[None]).square().sum()) for a, b in zip(A, B.T)]
            scale = layers[name]["scale"] ** 2 / float((X @ W.T).square().sum())
            energies[name][f"{files.name}/{context}"] = [scale * energy for energy in moved]
    assert config["r"] == 4
    for name, about in layers.items():
        for context, expected in energies[name].items():
            assert about["moved"][context]["components"] == pytest.approx(expected, rel=1e-3)
        each = [max(energies[name], key=lambda c, i=i: energies[name][c][i]) for i in range(about["r"])]
        assert about["serves"]["components"] == each
        squares = {context: moved["outputs"] ** 2 for context, moved in about["moved"].items()}
        total = sum(squares.values())
        assert about["serves"]["shares"] == pytest.approx({c: square / total for c, square in squares.items()})
    page = (made / "report.html").read_text(encoding="utf-8")
    assert f"components, {files.name}/sums" in page
    assert f"serves {files.name}/text most of all layers" in page


def test_predicted_drift_is_that_of_the_statistics(checkpoint, files, tmp_path_factory):
    """Of a CorDA adapter trained with a price: as the training wrote it down, by its statistics, and on the context."""
    folder = tmp_path_factory.mktemp("corda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("corda_lora.devices.accelerator", lambda: torch.device("cpu"))
        data = str(files / "sums.jsonl")
        start = ["init", "--model", str(checkpoint), "--context", data, "--r=2", "--keep=1"]
        main([*start, "--output", str(folder / "start")])
        train = ["train", "--model", str(checkpoint), "--start", str(folder / "start"), "--data", data, "--keep=1"]
        main([*train, "--max_steps=2", "--batch_size=4", "--precision=fp32", "--output", str(folder / "tuned")])
    (folder / "start").rename(folder / "moved")  # the adapter may be elsewhere than its start
    page = inspected(tmp_path_factory, "--adapter", folder / "tuned")
    alone = json.loads((page / "inspect.json").read_text())
    by_file = {name: about["kept"][""] for name, about in alone["layers"].items()}
    assert "Predicted drift on the context that was to be kept: " in (page / "report.html").read_text()

    from corda_lora.adapters.lora import load_adapter
    from corda_lora.preprocess.statistics import Statistics
    from corda_lora.training.keeping import PredictedDrift

    statistics = Statistics.load(folder / "moved" / "statistics.safetensors")
    predicted = PredictedDrift(load_adapter(base(checkpoint), folder / "tuned"), statistics).by_layer()
    assert by_file == pytest.approx({name: float(value) for name, value in predicted.items()}, rel=1e-4)
    assert sum(by_file.values()) > 0

    output = inspected(
        tmp_path_factory, "--adapter", folder / "tuned", "--model", checkpoint, f"--context={files / 'sums.jsonl'}"
    )
    record = json.loads((output / "inspect.json").read_text())
    on_context = {n: about["moved"][f"{files.name}/sums"]["predicted_drift"] for n, about in record["layers"].items()}
    # the statistics are in bfloat16 and in few directions; here C and D are whole
    assert sum(on_context.values()) == pytest.approx(sum(by_file.values()), rel=0.05)


@pytest.mark.parametrize("split", ["anchored", "paper"])
def test_a_start_is_said_to_change_nothing(split, checkpoint, files, tmp_path_factory, capsys):
    start = tmp_path_factory.mktemp("start") / "start"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("corda_lora.devices.accelerator", lambda: torch.device("cpu"))
        options = ["--r", 4, "--split", split, "--device", "cpu", "--output", start]
        main(list(map(str, ["init", "--model", checkpoint, "--context", files / "sums.jsonl", *options])))
    capsys.readouterr()
    contexts = ["--context", files / "sums.jsonl", "--context", files / "text.jsonl"]
    inspected(tmp_path_factory, "--adapter", start, "--model", checkpoint, *contexts)
    said = capsys.readouterr().out
    assert "It is a start, which nothing has trained: it changes nothing yet." in " ".join(said.split())
    assert not any(word in said for word in ("move", "Merging", "drift", "serves", "%"))


def test_a_map_shows_each_layer_at_its_place(made, layers):
    page = (made / "report.html").read_text(encoding="utf-8")
    found = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])["maps"]["change"]
    for name, about in layers.items():
        row, column = found["kinds"].index(about["kind"]), found["blocks"].index(about["block"])
        assert found["values"]["‖ΔW‖"][row][column] == pytest.approx(about["norm"]), name
        for context, moved in about["moved"].items():
            assert found["values"][f"‖ΔW X‖ / ‖W X‖, {context}"][row][column] == pytest.approx(moved["outputs"])


def test_in_bfloat16_merging_rounds_away(checkpoint, lora, tmp_path_factory):
    output = inspected(tmp_path_factory, "--adapter", lora, "--model", checkpoint, "--dtype=bfloat16")
    record = json.loads((output / "inspect.json").read_text())
    for name, change in updates(checkpoint, lora).items():
        W = base(checkpoint).get_submodule(name).weight.detach().bfloat16().float()
        merged = (W + change.float()).bfloat16().float()
        lost = float((merged - W - change.float()).norm() / change.norm())
        assert record["layers"][name]["rounded_away"] == pytest.approx(lost, rel=0.02)
    assert "is rounded away in the model’s dtype" in (output / "report.html").read_text()


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as error:
        main(["inspect", *map(str, arguments)])
    assert error.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_bad_adapters(checkpoint, lora, files, tmp_path, capsys):
    out = ["--output", tmp_path / "seen"]
    assert "is not an adapter directory" in refused(capsys, "--adapter", tmp_path, *out)
    said = refused(capsys, "--adapter", lora, f"--context={files / 'sums.jsonl'}", *out)
    assert "give its --model" in said
    assert "leave them or --adapter out" in refused(capsys, "--adapter", lora, "--levels=0.5", *out)

    def changed(name, **options):
        folder = tmp_path / name
        folder.mkdir()
        config = json.loads((lora / "adapter_config.json").read_text()) | options
        (folder / "adapter_config.json").write_text(json.dumps(config))
        weights = load_file(lora / "adapter_model.safetensors")
        return folder, weights

    folder, weights = changed("dora", use_dora=True)
    save_file(weights, folder / "adapter_model.safetensors")
    assert "is a DoRA" in refused(capsys, "--adapter", folder, *out)
    folder, weights = changed("diverged")
    next(iter(weights.values()))[0, 0] = math.nan
    save_file(weights, folder / "adapter_model.safetensors")
    assert "holds NaN or infinity: its training diverged" in refused(capsys, "--adapter", folder, *out)
    folder, weights = changed("other")
    save_file({n.replace("layers.1", "layers.7"): w for n, w in weights.items()}, folder / "adapter_model.safetensors")
    assert "the model has no layer model.layers.7." in refused(capsys, "--adapter", folder, "--model", checkpoint, *out)
    folder, weights = changed("wider")
    wider = {n: torch.cat([w, w], dim=1) if "lora_A" in n else w for n, w in weights.items()}
    save_file(wider, folder / "adapter_model.safetensors")
    said = refused(capsys, "--adapter", folder, "--model", checkpoint, *out)
    assert re.search(r"has the shape \(32, \d+\), but the adapter is for \(32, \d+\)", said), said
    assert not (tmp_path / "seen").exists()


def test_experts_and_copies_of_the_base_are_no_layers(lora, tmp_path):
    """PEFT's factors of fused experts are several in one, and it saves the base's own embeddings beside an adapter."""
    config = json.loads((lora / "adapter_config.json").read_text())
    config["target_parameters"] = ["mlp.experts.gate_up_proj"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    weights = load_file(lora / "adapter_model.safetensors")
    experts = "base_model.model.model.layers.0.mlp.experts"
    factors = {f"{experts}.lora_A.weight": torch.ones(16, 32), f"{experts}.lora_B.weight": torch.ones(48, 16)}
    copy = {"base_model.model.model.embed_tokens.base_layer.weight": torch.ones(4, 4)}
    save_file(weights | factors | copy, tmp_path / "adapter_model.safetensors")
    adapter = read_adapter(tmp_path)
    assert set(adapter.layers) == set(read_adapter(lora).layers)
    assert adapter.left == sorted(factors)


PROBE = """
<script>
(async () => {
  await new Promise((done) => setTimeout(done, 30));
  for (const details of document.querySelectorAll("details")) details.open = true;
  const out = { width: innerWidth, shown: [...document.querySelectorAll("section:not([hidden])")].map((s) => s.id) };
  const low = () => document.querySelector("#change svg").lastElementChild.previousElementSibling.textContent;
  out.cells = document.querySelectorAll("#change rect.cell").length;
  out.lows = [low()];
  document.querySelector('#change-choice button[data-value="rank"]').click();
  out.lows.push(low());
  out.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  parent.postMessage(JSON.stringify(out), "*");
})();
</script></body>"""


def test_the_page_in_a_browser(made, tmp_path):
    page = (made / "report.html").read_text(encoding="utf-8")
    assert "{{" not in page
    seen = helpers.browse(page, PROBE, tmp_path, "dark")
    assert seen["console"] == []
    assert [found["width"] for found in seen["pages"]] == [1280, 390]
    for found in seen["pages"]:
        assert found["shown"] == ["change-card"]
        assert (found["cells"], found["overflow"]) == (4, 0)
        assert found["lows"][1].startswith("2.00")
        assert found["lows"][0] != found["lows"][1]


def test_abilities_have_names_of_their_own(checkpoint, lora, files, tmp_path_factory, capsys):
    named = ["--model", checkpoint, "--context", files / "sums.jsonl", "--context.ability", "adding: #1"]
    named += ["--context", files / "text.jsonl"]
    page = inspected(tmp_path_factory, "--adapter", lora, *named)
    record = json.loads((page / "inspect.json").read_text())
    other = f"{files.name}/text"
    assert [context["name"] for context in record["contexts"]] == ["adding: #1", other]
    for about in record["layers"].values():
        assert about["serves"]["shares"].keys() == {"adding: #1", other}
        assert set(about["serves"]["components"]) <= {"adding: #1", other, ""}
    assert "components, adding: #1" in (page / "report.html").read_text()
    seen = json.loads((inspected(tmp_path_factory, *named) / "inspect.json").read_text())
    assert [context["name"] for context in seen["contexts"]] == ["adding: #1", other]
    capsys.readouterr()
    for twice, said in (
        (["--context.ability", "adding: #1"], "two contexts are called adding: #1"),
        (["--context", files / "text.jsonl"], "context names the same samples of"),
        (["--text", "x.txt", "--text.ability", "a"], "text.ability is no option"),
        (["--context.weight", "2"], "context.weight is no option"),
    ):
        with pytest.raises(SystemExit):
            inspected(tmp_path_factory, *named, *twice)
        assert said in capsys.readouterr().err
