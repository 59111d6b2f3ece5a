"""The recipes of the papers' set-ups, in recipes/: each is one that `corda compare` takes, and `corda plan` plans."""

from pathlib import Path

import pytest
import tiny
import tiny_vision
import yaml

from corda_lora import cli
from corda_lora.cli.command import instantiate
from corda_lora.cli.parser import build_parser
from corda_lora.cli.shared import take
from corda_lora.compare.runner import check_methods
from corda_lora.config import CompareConfig, DataConfig, ModelConfig
from corda_lora.data.templates import parse_template
from corda_lora.evaluation.tasks.registry import TASKS

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
VISUAL = ["okvqa_train", "okvqa_test", "pmc_vqa_train", "pmc_vqa_test", "visual_context"]
VISUAL += [f"{name}_test" for name in ("gqa", "textvqa", "vizwiz", "vqav2")]
COLUMNS = {  # of data sets on the hub, which no test can reach
    "HuggingFaceFW/finewiki": ["text"],
    "Salesforce/wikitext": ["text"],
    "finewiki_100.jsonl": ["text"],
    "fxmeng/WizardLM_evol_instruct_V2_143k": ["human", "assistant"],
    "google-research-datasets/nq_open": ["question", "answer"],
    "m-a-p/CodeFeedback-Filtered-Instruction": ["query", "answer", "resource", "lang"],
    "meta-math/MetaMathQA": ["type", "query", "original_question", "response"],
    "openai/gsm8k": ["question", "answer"],
    **{f"{name}.jsonl": ["image", "prompt", "response"] for name in VISUAL},
}
NAMES = [path.stem for path in RECIPES]


def load(path, *arguments) -> tuple[ModelConfig, CompareConfig]:
    """The recipe as `corda compare` reads it."""
    parser, _ = build_parser()
    options = parser.parse_args(["compare", "--config", str(path), "--output", "out", *arguments])
    options = instantiate(parser, options)["compare"]
    return take(ModelConfig, options), take(CompareConfig, options)


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_every_option_method_task_and_column_exists(path):
    _, recipe = load(path)
    check_methods(recipe)
    assert set(recipe.eval.tasks) <= TASKS.keys()
    datas = [recipe.data, *([recipe.context] if recipe.context else [])]
    for data in [*datas, *(d for kind in ("learn", "keep", "text") for d in recipe.eval.data(kind))]:
        assert isinstance(data, DataConfig)
        if data.label:  # a text of GLUE's: its columns are found by their names
            assert data.data == "nyu-mll/glue"
            continue
        for template in (data.prompt, data.response):
            parse_template(template, COLUMNS[data.data])
        assert data.prompt or data.response or COLUMNS[data.data] in (["text"], ["image", "prompt", "response"])
    same = recipe.data.data.replace("_train.", "_test.")
    assert recipe.eval.data("learn")[0].data in (recipe.data.data, same, "openai/gsm8k")
    assert recipe.train.batch_size % (recipe.train.micro_batch_size or 1) == 0


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_plan_says_what_a_recipe_takes_from_a_config_alone(path, checkpoint, tmp_path, capsys):
    """With the shapes of a tiny model, and a rank that it has."""
    if path.stem.startswith("roberta"):
        tiny.build("roberta").save_pretrained(tmp_path)
    elif path.stem.startswith("llava"):
        tiny_vision.save(tmp_path)
    else:
        (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    cli.main(["plan", str(path), "--model", str(tmp_path), "--r", "4", "--gpu", "24GB"])
    said = " ".join(capsys.readouterr().out.split())
    steps = {"peft_method_comparison": "5,000"}.get(path.stem, "782")
    if path.stem.startswith(("roberta", "llava")):
        assert "time: unknown, as nothing says how many samples the data has" in said
    else:
        assert f"one run after the other, {steps} steps each" in said
    for name in yaml.safe_load(path.read_text())["methods"]:
        assert name.split()[0][:8] in said
    assert "do not fit" not in said


def test_what_does_not_fit_is_named(checkpoint, capsys):
    path = next(path for path in RECIPES if path.stem == "llama-2-7b_math")
    cli.main(["plan", str(path), "--model", str(checkpoint), "--r", "4", "--gpu", "0.6GB"])
    assert "do not fit: lora, full, pissa" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere.yaml"], "File does not exist"),
        ([str(RECIPES[0]), "--model", "nowhere"], "to plan, a --model FOLDER with the model's config.json is enough"),
        ([str(RECIPES[0]), "--gpu", "much"], "--gpu is 'much', but must be the memory of a card"),
        ([str(RECIPES[0]), "--tflops", "3"], "give its memory with --gpu"),
        ([str(RECIPES[0]), "--r", "0"], "r is 0, but must be a whole number at least 1"),
    ],
)
def test_a_plan_that_cannot_be_made_is_a_sentence(arguments, sentence, checkpoint, capsys):
    if "--model" not in arguments:
        arguments = [*arguments, "--model", str(checkpoint)]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", *arguments])
    assert stopped.value.code == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_a_task_that_there_is_not_is_refused(checkpoint, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", str(RECIPES[0]), "--model", str(checkpoint), "--eval.tasks", "gsm9k"])
    assert stopped.value.code == 2
    assert "there is no task 'gsm9k'; nearest names: gsm8k" in capsys.readouterr().err
