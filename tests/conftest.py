"""What every test runs under: few threads, fixed seeds, no display and no network look-ups."""

import os

# Before any kernel is imported: they run on the CPU, in Triton's interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Before torch is imported. Two workers of pytest-xdist share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import networks
import numpy as np
import pytest
import torch

from mhc_lightning.modules import Transformer

REPOSITORY = Path(__file__).resolve().parents[1]

# What `make test` was called with is not for the make commands that tests run.
for _name in ("MAKEFLAGS", "MFLAGS", "ARGS", "VENV"):
    os.environ.pop(_name, None)

# On a busy machine one example can take long without anything being wrong.
hypothesis.settings.register_profile("repository", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repository")
torch.set_num_threads(1)

# What Lightning tells processes that it launches, and leaves behind in its own: a later command
# would wait for others, believing that somebody launches them.
_LAUNCHED = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")


@pytest.fixture(autouse=True)
def _launched_by_nobody() -> Iterator[None]:
    yield
    for name in _LAUNCHED:
        os.environ.pop(name, None)
    if torch.distributed.is_initialized():  # a strategy of this process alone has left it
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_transformer() -> Callable[..., Transformer]:
    """Returns a function: a network of two blocks, the second with experts, always the same."""
    return networks.tiny_transformer


@pytest.fixture(scope="session")
def repository() -> Path:
    """The top of the source tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def commands_in() -> Callable[..., list[str]]:
    """Returns a function: the command lines of a document's console blocks, in order."""

    def read(document: str, section: str = "") -> list[str]:
        text = (REPOSITORY / document).read_text(encoding="utf-8")
        if section:
            text = re.split(rf"^## {re.escape(section)}$", text, flags=re.MULTILINE)[1]
            text = re.split(r"^## ", text, flags=re.MULTILINE)[0]
        blocks = re.findall(r"^```console\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
        lines = "".join(blocks).replace("\\\n", " ").splitlines()
        return [line for line in (re.sub(r"\s+# .*", "", line).strip() for line in lines) if line]

    return read


@pytest.fixture(scope="session")
def copy_of_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the working tree that git knows or would add, as a fresh clone has them."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    folder = tmp_path_factory.mktemp("clone")
    for name in filter(None, listing.split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)
    return folder
