"""The recipe initialisation: candidates that differ in nothing else."""

import json
import math

import library_text
import pytest
import sweep
import torch
from recipes.initialisation import starts
from torch import nn

import initialisation
from mhc_lightning.callbacks.stream_diversity import relative_diversity
from mhc_lightning.cli.arguments import parse_arguments
from mhc_lightning.cli.composition import compose_experiment
from mhc_lightning.modules import ManifoldHyperConnection

STARTS = [
    starts.Symmetric,
    starts.StrongMixing,
    starts.UniformMixing,
    starts.SignedWrites,
    starts.SignedWritesStrongMixing,
    starts.OneStreamReads,
    starts.XavierProjection,
    starts.SmallProjection,
]


@pytest.mark.parametrize(("size", "seeds"), [("cpu", "1,2"), ("gpu", "1")])
def test_runs_differ_in_the_initialisation_and_the_seed_alone(size, seeds):
    runs = initialisation.runs_of(size, "", seeds, ("trainer.max_steps=9",))
    assert set(runs) == set(initialisation.CANDIDATES)
    found: dict[str, str] = {}
    first: dict[int, dict] = {}
    for name, own in runs.items():
        for seed, run in enumerate(own, start=1):
            words = ["fit", "--config", run.config, *run.overrides]
            values = compose_experiment(parse_arguments(words)).values()
            assert values["seed"] == seed and values["trainer"]["max_steps"] == 9
            found[name] = values.pop("connection").pop("_target_")
            for key in ("output_dir", "logger", "checkpoint"):
                values.pop(key)
            values["model"].pop("connection")
            assert values == first.setdefault(seed, values)
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize("start", STARTS)
def test_a_start_is_mhc_with_other_values(start):
    torch.manual_seed(0)
    ours, other = ManifoldHyperConnection(8, 4, 1), start(8, 4, 1)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in other.state_dict().items()
    }
    changed = [k for k, v in other.state_dict().items() if not v.equal(ours.state_dict()[k])]
    assert changed and "alpha" not in changed
    again = start(8, 4, 1)
    assert all(v.equal(again.state_dict()[k]) for k, v in other.state_dict().items())
    # Copies stay copies unless streams are written with different weights.
    streams = torch.randn(5, 1, 8).expand(5, 4, 8)
    after = other(streams, lambda u: nn.functional.rms_norm(u, (8,)))
    writes_alike = "Writes" not in start.__name__ and "Projection" not in start.__name__
    assert (relative_diversity(after) < 1e-6) == writes_alike


def test_what_the_starts_say_of_themselves():
    mean = torch.full((4, 4), 0.25)
    streams = torch.randn(3, 4, 8)
    torch.testing.assert_close(starts.UniformMixing(8, 4, 0).mappings(streams).residual[0], mean)
    strong = starts.StrongMixing(8, 4, 0).mappings(streams).residual[0, 0, 0].item()
    assert strong == pytest.approx(1 / (1 + 3 * math.exp(-3)), abs=1e-5)
    reads = starts.SmallProjection(8, 4, 0).bias[:4].sigmoid()
    torch.testing.assert_close(reads, torch.full((4,), 0.25))
    wide = starts.XavierProjection(512, 4, 0).phi
    assert wide.std().item() == pytest.approx((2 / (2048 + 24)) ** 0.5, rel=0.05)


def test_gaps_are_paired_by_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(initialisation.HERE.parents[1])
    monkeypatch.setattr(library_text, "run", lambda *words: None)
    validation = {"default_1": 2.0, "default_2": 3.0, "symmetric_1": 2.1, "symmetric_2": 3.3}

    def run_all(runs, folder, slurm, jobs):
        ended = {}
        for run in runs:
            own = folder / run.name
            own.mkdir(parents=True)
            tags = ["stream_diversity/mean", "stream_diversity/layer_0", "stream_diversity/layer_1"]
            tags += ["amax_gain/composite/backward", "val/loss"]
            rows = ["1,0.5,0,0.5,1.5,", f"2,0.7,0,0.7,1.25,{validation[run.name]}"]
            (own / "metrics.csv").write_text("\n".join([",".join(["step", *tags]), *rows, ""]))
            ended[run.name] = sweep.Outcome(own, False)
        return ended

    monkeypatch.setattr(initialisation, "run_all", run_all)
    initialisation.main(["only=default,symmetric", "seeds=1,2", f"output={tmp_path}"])
    found = json.loads((tmp_path / "results/initialisation.json").read_text())
    default, symmetric = found["candidates"]
    assert default["mean_gap_to_default"] is None and default["mean_validation_loss"] == 2.5
    assert symmetric["gap_to_default"] == pytest.approx([0.1, 0.3])
    half = 12.706 * 0.1  # Student's t with one degree of freedom, standard error 0.1
    gap = {"mean": 0.2, "low": 0.2 - half, "high": 0.2 + half}
    assert symmetric["mean_gap_to_default"] == pytest.approx(gap, rel=1e-3)
    assert symmetric["largest_composite_gain_backward"] == 1.5
    assert symmetric["diversity_by_step"] == {"1": 0.5, "2": 0.7}
    assert symmetric["diversity_by_layer"] == {"0": 0.0, "1": 0.7}
    assert (tmp_path / "results/initialisation.png").is_file()


def test_a_word_that_means_nothing_is_one_line(tmp_path, monkeypatch):
    for word in ("size=huge", "only=xavier", "seeds=one"):
        with pytest.raises(SystemExit, match=f"^error: {word} is not"):
            initialisation.runs_of(
                **{"size": "cpu", "only": "", "seeds": "1", "overrides": ()}
                | dict([word.split("=")])
            )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^error: call this in "):
        initialisation.main([])
