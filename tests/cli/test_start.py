"""What a command imports before it works, and what it leaves alone."""

import gc
import json
import subprocess
import sys

import pytest

from mhc_lightning import __main__ as program
from mhc_lightning.cli.fewer_collections import fewer_collections, set_aside

TRAINING = {"lightning", "torchmetrics", "litdata", "transformers", "tensorboard", "matplotlib"}
DISTRIBUTED = {"torch.distributed.checkpoint", "torch.distributed.tensor"}


def imported_by(code: str, *words: str) -> set[str]:
    """The modules that a fresh process has imported at the end of `code`."""
    code += "\nimport json, sys\nprint(json.dumps([*sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def imported_by_command(*words: str) -> set[str]:
    run = "import sys; from mhc_lightning.cli.main import main; assert main(sys.argv[1:]) == 0"
    return imported_by(run, *words)


def test_plan_imports_nothing_that_trains() -> None:
    imported = imported_by_command("plan", "--config", "mhc_quickstart")
    assert not (TRAINING | {"torch.distributed.checkpoint"}) & imported
    assert "torch" in imported


def test_inspect_imports_nothing_that_trains_or_joins_processes(trained) -> None:
    imported = imported_by_command("inspect", str(trained.folder / "run"))
    assert not (TRAINING | {"torch.distributed.checkpoint"}) & imported
    assert "torch" in imported


def test_modules_do_without_sharding_and_compiler() -> None:
    code = (
        "import torch; from mhc_lightning.modules import ManifoldHyperConnection\n"
        "ManifoldHyperConnection(dim=8, num_streams=4, layer_index=0)"
    )
    assert not (DISTRIBUTED | {"torch._dynamo", "sympy", "lightning"}) & imported_by(code)


def test_the_package_of_callbacks_imports_lightning_with_the_first_of_them() -> None:
    code = (
        "import sys\n"
        "import mhc_lightning.callbacks as callbacks\n"
        "from mhc_lightning.callbacks.gains import chains\n"
        "assert chains([]) == [] and 'lightning' not in sys.modules\n"
        "assert all(getattr(callbacks, name).__name__ == name for name in callbacks.__all__)"
    )
    assert "lightning" in imported_by(code)


def test_collections_are_fewer_within_and_as_before_after_an_error() -> None:
    before = gc.get_threshold()

    def collections() -> int:
        count = gc.get_stats()[0]["collections"]
        kept: list[list[int]] = [[] for _ in range(40_000)]
        assert len(kept) == 40_000
        return gc.get_stats()[0]["collections"] - count

    usual = collections()
    with pytest.raises(KeyError), fewer_collections():
        within = collections()
        raise KeyError
    assert gc.get_threshold() == before
    assert within <= 1 < 10 < usual
    assert fewer_collections()(gc.get_threshold)()[0] > before[0]
    assert gc.get_threshold() == before


@pytest.mark.parametrize(
    ("command", "frozen"), [("plan", True), ("generate", True), ("fit", False)]
)
def test_garbage_is_left_to_the_end_of_the_process_where_nothing_trains(
    monkeypatch: pytest.MonkeyPatch, command: str, frozen: bool
) -> None:
    freezes: list[str] = []
    monkeypatch.setattr(sys, "argv", ["mhc_lightning", command])
    monkeypatch.setattr(program.command_line, "main", lambda: 3)
    monkeypatch.setattr(program.gc, "freeze", lambda: freezes.append(command))
    assert program.main() == 3
    assert bool(freezes) == frozen


def test_what_is_there_is_set_aside_until_the_run_ends() -> None:
    before = gc.get_freeze_count()
    with pytest.raises(KeyError), set_aside():
        assert gc.get_freeze_count() > before + 10_000
        raise KeyError
    assert gc.get_freeze_count() == 0
