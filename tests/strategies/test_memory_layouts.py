"""A memory of n-grams trains in two and four processes as it does in one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("memory_in_processes.py")
BOTH = ("engram", "over_encoding")
ODD = {"num_heads": 3, "dim": 6}


def train(folder: Path, processes: int, *legs: dict[str, Any]) -> dict[str, Any]:
    """Run legs in one launch of so many processes; what the first process saw of each."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    devices = {"devices": processes} if processes > 1 else {"strategy": "single"}
    named = [{**devices, **leg} for leg in legs]
    done = subprocess.run(
        [
            sys.executable,
            *(launcher if processes > 1 else []),
            str(SCRIPT),
            json.dumps(named),
            str(folder),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[:20000]
    return {
        leg["name"]: torch.load(folder / f"{leg['name']}.pt", weights_only=False) for leg in named
    }


def assert_same_training(ours: dict[str, Any], expected: dict[str, Any], name: str) -> None:
    """Losses and norms of every step, the first step's gradients, and the final parameters."""
    assert len(expected["rows"]) == 5 and expected["rows"][0]["train/grad_norm"] > 0.5
    assert len(ours["rows"]) == len(expected["rows"]), name
    for row, wanted in zip(ours["rows"], expected["rows"], strict=True):
        assert row == pytest.approx(wanted, rel=1e-6), name
    for part in ("gradients", "state"):
        assert sorted(ours[part]) == sorted(expected[part]), (name, part)
        for key, wanted in expected[part].items():
            difference = torch.linalg.vector_norm((ours[part][key] - wanted).double())
            assert difference <= 1e-6 * torch.linalg.vector_norm(wanted.double()), (name, part, key)
    assert list(ours["state"]) == list(expected["state"]), name


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process, with each memory; `odd` tables have six heads, which four processes share."""
    legs: list[dict[str, Any]] = [
        *({"name": memory, "memory": memory} for memory in BOTH),
        {"name": "odd", "memory": "engram", "settings": ODD},
    ]
    return train(tmp_path_factory.mktemp("single"), 1, *legs)


def run_legs(folder: Path, single: dict[str, Any], processes: int, *legs: dict[str, Any]) -> None:
    """Run legs in so many processes; each must train as its memory does in one."""
    named = [
        {"name": f"{k} {leg['memory']} {leg['strategy']}", **leg} for k, leg in enumerate(legs)
    ]
    for leg, ours in zip(named, train(folder, processes, *named).values(), strict=True):
        odd = leg.get("settings", {}).get("num_heads") == ODD["num_heads"]
        assert_same_training(ours, single["odd" if odd else leg["memory"]], leg["name"])


def pipeline(schedule: str, **more: Any) -> dict[str, Any]:
    return {"strategy": "pipeline", "layout": {"schedule": schedule, **more}}


SHARDED, HOST = {"placement": "sharded"}, {"placement": "host"}


@pytest.mark.slow
def test_every_layout_of_two_processes_trains_as_one_process_does(
    single: dict[str, Any], tmp_path: Path
) -> None:
    """The tokens reach every stage, also when backward computes a block again; from meta too."""
    run_legs(
        tmp_path,
        single,
        2,
        {"memory": "engram", **pipeline("1f1b"), "recompute": 3},
        {"memory": "engram", **pipeline("zbv"), "meta": True, "settings": SHARDED},
        {"memory": "engram", **pipeline("dualpipev", microbatches=4), "recompute": "auto"},
        {"memory": "over_encoding", **pipeline("1f1b"), "meta": True},
        {"memory": "over_encoding", **pipeline("zbv"), "recompute": "auto"},
        *({"memory": memory, "strategy": "ddp"} for memory in BOTH),
        {"memory": "engram", "strategy": "ddp", "settings": SHARDED, "recompute": 3},
        {"memory": "over_encoding", "strategy": "ddp", "settings": SHARDED, "meta": True},
        {"memory": "engram", "strategy": "fsdp", "meta": True},
        {"memory": "over_encoding", "strategy": "fsdp", "settings": SHARDED},
        {"memory": "engram", "strategy": "ddp", "settings": HOST, "recompute": 3},
        {"memory": "engram", "strategy": "fsdp", "settings": HOST, "meta": True},
        {"memory": "engram", **pipeline("zbv"), "settings": HOST, "meta": True},
    )


@pytest.mark.slow
def test_documents_are_kept_apart_in_every_layout(tmp_path: Path) -> None:
    """Every stage finds them from the tokens; from meta, and when streams are computed again."""
    apart = {"end_of_document": 3}
    legs: list[dict[str, Any]] = [{"name": memory, "memory": memory, **apart} for memory in BOTH]
    looked_through = {"name": "engram, not apart", "memory": "engram"}
    single = train(tmp_path, 1, *legs, looked_through)
    losses = [[row["train/loss"] for row in single[n]["rows"]] for n in single]
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)
    run_legs(
        tmp_path,
        single,
        2,
        {"memory": "engram", **apart, **pipeline("1f1b"), "recompute": 3},
        {"memory": "engram", **apart, **pipeline("zbv"), "meta": True},
        {"memory": "over_encoding", **apart, **pipeline("dualpipev", microbatches=4)},
        {"memory": "engram", **apart, "strategy": "ddp"},
        {"memory": "engram", **apart, "strategy": "fsdp", "meta": True, "recompute": "auto"},
        {"memory": "over_encoding", **apart, "strategy": "fsdp"},
    )


@pytest.mark.slow
def test_every_layout_of_four_processes_trains_as_one_process_does(
    single: dict[str, Any], tmp_path: Path
) -> None:
    """Two pipelines of two stages, and four shares of the batch; heads cut apart, too."""
    two_by_two = {"pipeline_size": 2}
    run_legs(
        tmp_path,
        single,
        4,
        {"memory": "engram", **pipeline("1f1b", **two_by_two), "meta": True, "recompute": 3},
        {"memory": "engram", **pipeline("zbv", **two_by_two)},
        {"memory": "over_encoding", **pipeline("dualpipev", **two_by_two), "settings": SHARDED},
        {"memory": "engram", "strategy": "fsdp", "recompute": 3, "settings": ODD},
        {"memory": "over_encoding", "strategy": "fsdp", "meta": True},
        {"memory": "engram", "strategy": "ddp", "settings": {**ODD, **SHARDED}, "meta": True},
        {"memory": "over_encoding", "strategy": "ddp", "settings": SHARDED},
        {"memory": "engram", "strategy": "ddp", "settings": {**ODD, **HOST}, "meta": True},
        {"memory": "engram", **pipeline("1f1b", **two_by_two), "settings": HOST, "recompute": 3},
        {"memory": "over_encoding", "strategy": "fsdp", "settings": HOST},
    )


@pytest.mark.slow
def test_a_run_that_moves_between_all_placements_and_sizes_is_the_run_that_stays(
    tmp_path: Path,
) -> None:
    """Optimizer state of the rows and all, by folders and by whole files; written behind, too."""
    folders, file, behind = {"sharded": True}, {"sharded": False}, {"asynchronous": True}
    # Not Engram: the slope of its gate is so steep near zero that rounding shows.
    moving = {
        "memory": "over_encoding",
        "adam": True,
        "lr": 0.01,
        "folder": "moving",
        "resume": "last",
        "eps": 1e-5,  # Adam divides by gradients, some of which are mostly rounding
    }
    sharded = {**moving, "settings": SHARDED, "meta": True}
    host = {**moving, "settings": HOST, "meta": True}

    def leg(start: int, **more: Any) -> dict[str, Any]:
        return {"name": f"until {start + 1}", "start": start, "steps": start + 1, **more}

    two = [
        # Not from meta: constants such as 0.01 would be float64, and not float32 made wider.
        leg(0, **{**sharded, "resume": None, "meta": False}, strategy="ddp", save=folders),
        leg(1, **sharded, **pipeline("zbv"), save=behind),
        leg(2, **host, strategy="fsdp", save=file),
    ]
    four = [
        leg(3, **sharded, strategy="ddp", save=behind),
        leg(4, **sharded, **pipeline("1f1b", pipeline_size=2), save=folders),
        leg(5, **host, strategy="ddp", save=folders),
    ]
    back = [
        leg(6, **host, **pipeline("1f1b", pipeline_size=1), save=behind),
        leg(7, **moving, strategy="ddp", save=file),
        leg(8, **sharded, strategy="ddp", save=folders),
    ]
    still = {**moving, "name": "still", "folder": "still", "resume": None, "save": file}
    train(tmp_path, 2, *two)
    train(tmp_path, 4, *four)
    train(tmp_path, 2, *back)
    last = leg(9, **{**host, "meta": False}, save=file)
    one = train(tmp_path, 1, last, {**still, "steps": 10})
    losses = [
        row["train/loss"]
        for step in range(1, 11)
        for row in torch.load(tmp_path / f"until {step}.pt", weights_only=False)["rows"]
    ]
    assert losses == pytest.approx([row["train/loss"] for row in one["still"]["rows"]], rel=1e-6)
    ends = [
        torch.load(tmp_path / name / "step_00000010.ckpt", weights_only=False)
        for name in ("moving", "still")
    ]
    for path in ("state_dict", "optimizer_states"):
        ours, expected = (flat(end[path]) for end in ends)
        assert ours.keys() == expected.keys()
        for key, tensor in expected.items():
            difference = torch.linalg.vector_norm(ours[key].double() - tensor.double())
            assert difference <= 1e-6 * torch.linalg.vector_norm(tensor.double()), key


@pytest.mark.slow
def test_no_process_ever_holds_a_table_whole(tmp_path: Path) -> None:
    """To set up, train, save and resume: no tensor of a process is larger than its share.

    Nor does the memory of a process grow by the size of the two tables, of 32 MiB each.
    """
    rows = {**SHARDED, "num_heads": 2, "orders": [2, 3], "rows": 131_072 - 64 * 5, "dim": 16}
    common = {"memory": "engram", "meta": True, "counted": True, "adam": True, "lr": 0.01}
    save = {"sharded": True}
    small = {**common, "settings": {**SHARDED, "rows": 500, "dim": 16}, "strategy": "ddp"}
    legs = [{**small, "name": "small", "steps": 2, "save": save}]
    shares = {"ddp": 4, "fsdp": 4, "pipeline": 2}
    for strategy in (
        {"strategy": "ddp"},
        {"strategy": "fsdp"},
        pipeline("1f1b", pipeline_size=2),
    ):
        large = {**common, **strategy, "settings": rows, "save": save}
        folder = f"large {strategy['strategy']}"
        legs += [
            {**large, "name": folder, "folder": folder, "steps": 2},
            {**large, "name": f"{folder} resumed", "folder": folder, "steps": 3, "start": 2,
             "resume": "last"},
        ]  # fmt: skip
    seen = train(tmp_path, 4, *legs)
    del seen["small"]  # it is there to have torch's own memory in place
    for name, counted in seen.items():
        largest, table, grown = counted.unbind(1)
        share = shares[name.split()[1]]
        assert (table > 4_000_000).all() and (largest * share <= table).all(), (name, counted)
        most, both = int(grown.max()), 2 * 8 * int(table[0])
        print(f"{name}: tables of {both:,} bytes, a process grew by {most:,} at most")
        assert most < 0.75 * both, name  # a quarter, a copy of it, and what is not the tables


def flat(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """The tensors of nested values, by their places in them."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    if not isinstance(value, dict | list | tuple):
        return {}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: t for key, v in items for k, t in flat(v, f"{name}/{key}").items()}
