"""Experts spread over two and four processes train as in one; sizes that do not fit are refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import experts_in_processes
import pytest
import torch
from torch import Tensor

from mhc_lightning import LanguageModel
from mhc_lightning.errors import UserError
from mhc_lightning.modules import MixtureOfExperts, ResidualConnection, Transformer, initialisation
from mhc_lightning.modules.token_exchange import AtHome, Visit
from mhc_lightning.optimizers.recipes import AdamWRecipe
from mhc_lightning.strategies import FullyShardedStrategy, PipelineStrategy

SCRIPT = Path(experts_in_processes.__file__)
MUON = {"recipe": "muon", "lr": 0.01}


def here(folder: Path, *legs: dict[str, Any]) -> dict[str, Any]:
    """Run legs in this process; what it saw of each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initialisation, "_GROUP", initialisation._GROUP)  # the run changes it
        for leg in legs:
            experts_in_processes.run({"strategy": "single", **leg}, folder)
    return seen(folder, *legs)


def seen(folder: Path, *legs: dict[str, Any]) -> dict[str, Any]:
    return {
        leg["name"]: torch.load(folder / f"{leg['name']}.pt", weights_only=False) for leg in legs
    }


def launch(folder: Path, processes: int, *legs: dict[str, Any], code: int = 0) -> Any:
    """Run legs in one launch of so many processes; what the first process saw of each.

    If the launch has to end with another code than 0: what was written to standard error.
    """
    named = [
        {"strategy": "fsdp", "devices": processes, **leg, "layout": layout}
        for leg in legs
        for layout in [{"expert_parallel_size": leg["size"], **leg.get("layout", {})}]
    ]
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"),
            str(SCRIPT),
            json.dumps(named),
            str(folder),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stderr[:20000]
    if code:
        return done.stderr
    return seen(folder, *legs)


def assert_close(ours: Tensor, wanted: Tensor, name: str) -> None:
    difference = torch.linalg.vector_norm((ours - wanted).double())
    assert difference <= 1e-6 * torch.linalg.vector_norm(wanted.double()), name


def assert_same_training(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    """Losses, norms and loads of every step, the first gradients, the final parameters."""
    assert len(ours["rows"]) == len(expected["rows"]) == 5
    for row, wanted in zip(ours["rows"], expected["rows"], strict=True):
        assert row == pytest.approx(wanted, rel=1e-6)
    if ours["loads"].shape == expected["loads"].shape:  # not a stage's
        assert torch.equal(ours["loads"], expected["loads"])
    for part in ("gradients", "state"):
        assert list(ours[part]) == list(expected[part])
        for name, wanted in expected[part].items():
            assert_close(ours[part][name], wanted, name)


@pytest.mark.slow
def test_spread_experts_train_as_those_of_one_process(tmp_path: Path) -> None:
    """With several processes for each expert or one, built whole or on meta, recompute or not.

    So do those of pipelines, also when backward takes the gradients of weights by themselves.

    In the skewed runs half of the processes get no token at all, and one process an empty expert.
    A run that moves between layouts is the run that stays, whole files and folders alike.
    """
    single = here(
        tmp_path,
        {"name": "even", "layers": 4},
        {"name": "skewed", "skewed": True},
        {"name": "still", **MUON},
        {"name": "moving 1", "folder": "moving", "steps": 2, "save": {"sharded": True}, **MUON},
    )
    loads = single["skewed"]["loads"]
    assert (loads[0, :, :4] == 0).all() and (loads[0, :, -1] == 0).all()
    assert single["even"]["loads"][0].std() > 5, "routing is uneven"

    moving = {"folder": "moving", "resume": "last", **MUON}
    pipelines = {"strategy": "pipeline"}
    four = launch(
        tmp_path,
        4,
        {"name": "2 replicas", "size": 2, "layers": 4, "recompute": "auto", "meta": True},
        {"name": "1 replica", "size": 4, "skewed": True, "meta": True},
        {"name": "2 pipelines", "size": 2, "layers": 4, "meta": True, **pipelines}
        | {"layout": {"schedule": "zbv", "pipeline_size": 2}},
        {"name": "moving 2", "size": 2, "start": 2, "steps": 3, "save": {"asynchronous": True}}
        | moving,
        {"name": "moving 3", "size": 2, "start": 3, "steps": 4, "save": {"sharded": False}}
        | {"layout": {"pipeline_size": 2}, **pipelines, **moving},
    )
    held = {name: set(leg["held"]) for name, leg in four.items()}
    assert held == {
        "2 replicas": {2},
        "1 replica": {2},
        "2 pipelines": {4},
        "moving 2": {2},
        "moving 3": set(),  # its stage has no experts
    }
    assert_same_training(four["2 replicas"], single["even"])
    assert_same_training(four["2 pipelines"], single["even"])
    assert_same_training(four["1 replica"], single["skewed"])

    back = here(tmp_path, {"name": "moving 4", "start": 4, "steps": 5, **moving})
    moved = [single["moving 1"], four["moving 2"], four["moving 3"], back["moving 4"]]
    rows = [row for part in moved for row in part["rows"]]
    assert len(rows) == 5
    for row, wanted in zip(rows, single["still"]["rows"], strict=True):
        assert row == pytest.approx(wanted, rel=1e-6)
    for name, wanted in single["still"]["state"].items():
        assert_close(back["moving 4"]["state"][name], wanted, name)
    for number, entries in single["still"]["optimizer"].items():
        for entry, wanted in entries.items():
            assert_close(back["moving 4"]["optimizer"][number][entry], wanted, f"{entry} {number}")


@pytest.mark.slow
def test_two_processes_share_experts_under_adamw(tmp_path: Path) -> None:
    """Experts and all else are on different meshes, which torch's fused kernel does not take."""
    adamw = {"name": "adamw", "recipe": "adamw", "lr": 0.001, "shared": 0, "skewed": True}
    single = here(tmp_path, adamw)["adamw"]
    assert_same_training(launch(tmp_path, 2, {**adamw, "size": 2})["adamw"], single)


@pytest.mark.slow
def test_a_process_that_keeps_others_from_their_tokens_is_named(tmp_path: Path) -> None:
    """The others wait in an all-to-all that was begun before."""
    layout = {"expert_parallel_size": 2, "timeout_seconds": 3}
    leg = {"name": "hung", "size": 2, "breaks": "hung", "layout": layout}
    errors = launch(tmp_path, 2, leg, code=1)
    assert "error: rank 1 hangs at step 1, " in errors and "waited for 3 s" in errors


def network(**settings: Any) -> Transformer:
    with torch.device("meta"):
        return Transformer(
            connection=ResidualConnection,
            vocab_size=8,
            dim=8,
            num_layers=2,
            num_heads=1,
            ffn_dim=8,
            **settings,
        )


def with_processes(processes: int, size: Any) -> FullyShardedStrategy:
    strategy = FullyShardedStrategy(expert_parallel_size=size)
    strategy.parallel_devices = processes * [torch.device("cpu")]
    return strategy


@pytest.mark.parametrize(
    ("processes", "size", "experts", "words"),
    [
        (4, 3, 6, "must divide the 4 .* devices and the 6 experts of a layer; use one of 1, 2$"),
        (6, 4, 8, "must divide the 6 .* devices and the 8 experts of a layer; use one of 1, 2$"),
        (4, 2, 0, "the model has no experts to spread; use 1"),
    ],
)
def test_a_size_that_does_not_fit_is_refused(
    processes: int, size: int, experts: int, words: str
) -> None:
    model = network(num_experts=experts, num_active_experts=min(experts, 2))
    module = LanguageModel(model, AdamWRecipe(lr=0.1))
    with pytest.raises(UserError, match=rf"^strategy.expert_parallel_size={size}:? .*{words}"):
        with_processes(processes, size).check(module)


def test_the_stages_of_pipelines_share_experts() -> None:
    """So the pipelines count, and not all processes."""
    strategy = PipelineStrategy(pipeline_size=2, expert_parallel_size=4)
    strategy.parallel_devices = 4 * [torch.device("cpu")]
    module = LanguageModel(network(num_experts=4, num_active_experts=2), AdamWRecipe(lr=0.1))
    with pytest.raises(UserError, match="must divide the 2 data-parallel devices and the 4 exp"):
        strategy.check(module)
    with pytest.raises(UserError, match="expert_parallel_size must be a whole number"):
        PipelineStrategy(expert_parallel_size=0)


@pytest.mark.parametrize("size", [0, -2, 1.5, "two", True, None])
def test_only_whole_numbers_are_sizes(size: Any) -> None:
    with pytest.raises(UserError, match="expert_parallel_size must be a whole number from 1 on"):
        with_processes(4, size)


def test_a_module_that_gathers_its_experts_itself_is_refused() -> None:
    strategy = with_processes(4, 2)
    model = network(num_experts=4, num_active_experts=2)
    strategy._lightning_module = LanguageModel(model, AdamWRecipe(lr=0.1))
    with pytest.raises(UserError, match=r"the module has not spread its experts: call .*shard"):
        strategy.setup(None)  # type: ignore[arg-type]


def test_the_shared_experts_run_while_copies_travel() -> None:
    """What lies between the beginning of a way and its end does not depend on it."""
    mixture = MixtureOfExperts(8, 16, num_experts=4, num_active_experts=2, num_shared_experts=1)
    x = torch.randn(5, 8)
    expected, seen = mixture(x), []

    class Told(AtHome):
        def begin(self, rows: Tensor, counts: Tensor) -> Visit:
            visit = super().begin(rows, counts)
            seen.append("begin")
            for name in ("arrive", "begin_return", "returned"):
                setattr(visit, name, self._told(name, getattr(visit, name)))
            return visit

        def _told(self, name: str, method: Any) -> Any:
            return lambda *args: (seen.append(name), method(*args))[1]

    mixture.exchange = Told()
    assert mixture.shared is not None
    mixture.shared.register_forward_hook(lambda *_: seen.append("shared"))
    torch.testing.assert_close(mixture(x), expected, rtol=0, atol=0)
    assert seen == ["begin", "shared", "arrive", "begin_return", "returned"]
