"""PEFT's own tests of CorDA, from its source distribution, with `corda_lora.peft.preprocess_corda` in place of theirs.

    python benchmarks/pefts_own_tests.py      downloads a few MB from the package index; further arguments go to pytest

The other packages that these tests import go into a temporary folder. Two tests load a random GPT-2 from the hub: a
model of the same kind, made here, stands in for it.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

THEIRS, OURS = "from peft.tuners.lora.corda import preprocess_corda", "from corda_lora.peft import preprocess_corda"
STAND_IN = """
import pytest
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    own = AutoModelForCausalLM.from_pretrained
    size = {"n_embd": 32, "n_layer": 5, "n_head": 4, "vocab_size": 1000}

    def from_pretrained(name, *args, **options):
        made_here = name == "peft-internal-testing/tiny-random-gpt2"
        return GPT2LMHeadModel(GPT2Config(**size)).eval() if made_here else own(name, *args, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
"""


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder, name = Path(temporary), f"peft-{version('peft')}"
        pip = [sys.executable, "-m", "pip", "-q"]
        source = ["download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", name.replace("-", "==")]
        subprocess.run([*pip, *source, "-d", folder], check=True)
        subprocess.run(
            [*pip, "install", "--no-deps", "--target", folder / "site", "scipy", "parameterized"], check=True
        )
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
        tests = folder / "run" / "tests"  # not beside PEFT's sources: the installed ones are tested
        tests.parent.mkdir()
        (folder / name / "tests").rename(tests)
        (tests / "__init__.py").touch()
        (tests / "conftest.py").write_text(STAND_IN)
        path = tests / "test_initialization.py"
        text = path.read_text()
        assert text.count(THEIRS) == 1
        path.write_text(text.replace(THEIRS, OURS))
        paths = [str(folder / "site"), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
        options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-k", "TestCordaInitialization"]
        command = [sys.executable, "-m", "pytest", *options, "tests/test_initialization.py", *sys.argv[1:]]
        return subprocess.run(command, cwd=tests.parent, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
