"""Outputs sent to the Hugging Face hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from httpx import HTTPError
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ..config import CordaError
from ..files import CHECKSUMS

# Later saves there (PEFT's `push_to_hub`) would not renew the checksums; the rest is of use on this machine only.
STAYS_HERE = [CHECKSUMS, "timing.json", "statistics.safetensors", "runs/*"]


def make_repo(name: str, private: bool | None = None) -> str:
    """Make a repository for a model on the hub, or find one's own there. To be called before long work, as a Trainer
    does. Returns its whole name, with the user's or the organization's.

    Args:
        private: of a new repository. Default: the hub's, which is public unless the organization says otherwise.

    Raises:
        CordaError: the name cannot be one, there is no token or none that may write there, or the hub is out of reach.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise CordaError("--push needs the hub, but HF_HUB_OFFLINE is set")
    if huggingface_hub.get_token() is None:
        raise CordaError("--push needs a token of the hub: run `hf auth login`, or set HF_TOKEN")
    with _asking(f"the hub does not let us write to {name}"):
        return str(huggingface_hub.HfApi().create_repo(name, private=private, exist_ok=True).repo_id)


def push(folder: Path, repo: str) -> str:
    """Send a folder to a repository on the hub. Returns the address of the commit.

    Raises CordaError if it cannot be sent; the folder stays as it is.
    """
    with _asking(f"{folder} is written, but not sent to the hub (`hf upload {repo} {folder}` does it)"):
        commit = huggingface_hub.HfApi().upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Upload by corda-lora", ignore_patterns=STAYS_HERE
        )
    return str(commit.commit_url)


@contextmanager
def _asking(failure: str) -> Iterator[None]:
    """Turn the hub's errors, and those of the way to it, into one sentence."""
    try:
        yield
    except HFValidationError as error:
        raise CordaError(f"--push: {error}") from error
    except HfHubHTTPError as error:
        raise CordaError(f"{failure}: {error.server_message or str(error).strip().splitlines()[0]}") from error
    except (HTTPError, OSError) as error:
        raise CordaError(f"{failure}: the hub cannot be reached ({error})") from error
