"""The scaling recipes: what they run, and what they make of results that are known beforehand."""

import json
import math
from pathlib import Path

import library_text
import pytest
import scaling
import yaml
from sweep import Outcome

import compute_scaling
import token_scaling
from mhc_lightning.cli.arguments import parse_arguments
from mhc_lightning.cli.composition import compose_experiment

MEMBERS = [
    *(m for members in compute_scaling.SIZES.values() for m in members),
    *token_scaling.SIZES.values(),
]


def settings_of(run):
    words = ["fit", "--config", run.config, *run.overrides]
    return compose_experiment(parse_arguments(words)).values()


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: Path(member.config).stem)
def test_connections_get_the_same_run(member):
    names = ["residual", "hc", "mhc"]
    runs = scaling.runs_of([member], names, [3], ("trainer.log_every_n_steps=7",))
    connections, others = [], []
    for run in runs.values():
        values = settings_of(run)
        connections.append(str(values.pop("connection")))
        for section in (values["model"], values["logger"], values["checkpoint"]):
            section.pop("connection", None)
        for key in ("output_dir", "logger", "checkpoint"):
            values.pop(key)
        others.append(values)
    assert len(set(connections)) == len(names)
    assert all(values == others[0] for values in others)
    assert others[0]["seed"] == others[0]["data"]["seed"] == 3
    assert others[0]["trainer"]["log_every_n_steps"] == 7


@pytest.mark.parametrize("members", compute_scaling.SIZES.values(), ids=compute_scaling.SIZES)
def test_members_are_one_family_and_tokens_grow_with_them(members):
    runs = scaling.runs_of(members, ["residual"], [1], ()).values()
    widths, tokens, vocabularies = [], [], set()
    for run in runs:
        values = settings_of(run)
        model, data, trainer = values["model"], values["data"], values["trainer"]
        dim = model["dim"]
        widths.append((dim, model["num_layers"]))
        tokens.append(data["batch_size"] * data["sequence_length"] * trainer["max_steps"])
        vocabularies.add(model["vocab_size"])
        assert model["num_heads"] * model["head_dim"] / dim == 1.6
        assert model["rope_dim"] / model["head_dim"] == 0.5
        assert model["ffn_dim"] / dim == pytest.approx(0.7, abs=0.1)
        assert (model["num_active_experts"], model["num_shared_experts"]) == (6, 2)
        assert model["num_experts"] in (64, 72)
        # the last validation is at the end
        assert trainer["max_steps"] % trainer["val_check_interval"] == 0
    assert widths == sorted(set(widths)) and tokens == sorted(set(tokens))
    assert len(vocabularies) == 1


def test_what_the_command_line_may_say():
    assert scaling.connections_of("hc,krom") == ["residual", "hc", "krom"]
    assert scaling.connections_of("mhc,residual") == ["residual", "mhc"]
    assert scaling.seeds_of("3, 1,3") == [3, 1]
    assert [m.name for m in compute_scaling.members_of("gpu", "50m,10m")] == ["10m", "50m"]


@pytest.mark.parametrize("recipe", [compute_scaling, token_scaling])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["size=huge"], r"size=huge is not known; choose from cpu, gpu, paper"),
        (["jobs=0"], r"jobs=0 is not a number of runs, 1 or more"),
        (["seeds=1,x"], r"seeds=1,x is not understood; .*"),
        (["seeds="], r"seeds= is not understood; .*"),
        (["only=residual"], r"only=residual leaves nothing to compare with residual"),
        (["seed=4"], r"seed= differs between the runs; say seeds=1,2 instead"),
        (["connection=hc"], r"connection= differs between the runs; say only=hc,mhc instead"),
        (["output_dir=x"], r"output_dir= differs .*; say output=FOLDER instead"),
    ],
)
def test_a_mistake_is_one_line(recipe, words, message):
    with pytest.raises(SystemExit, match=rf"^error: {message}$"):
        recipe.main(words)


def test_an_unknown_member_is_one_line():
    with pytest.raises(SystemExit, match=r"^error: members=1b is not known; choose from 200k, .*$"):
        compute_scaling.main(["members=1b"])


FLOPS = {"200k": 1, "700k": 10, "1700k": 100, "3m": 1000}


def stand_in(monkeypatch, losses):
    """Runs that come to `losses(member, connection, seed)`, by step; without the last: diverged."""
    commands = []

    def run(*words, capture=False):
        commands.append(words)
        flops = FLOPS.get(Path(words[2]).stem, 1) * (11 if "connection=mhc" in words else 10)
        return json.dumps({"parameters": {"total": 9, "active": 5}, "flops_per_token": flops})

    def run_all(runs, folder, *_):
        outcomes = {}
        for each in runs:
            words = dict(word.split("=", 1) for word in each.overrides)
            found = losses(each.name.split("_")[0], words["connection"], int(words["seed"]))
            own = folder / each.name
            own.mkdir(parents=True)
            data = {"batch_size": 10, "sequence_length": 10, "validation_sequences": None}
            config = {"data": data, "trainer": {"max_steps": 100}}
            (own / "config.yaml").write_text(yaml.safe_dump(config))
            (own / "environment.json").write_text(json.dumps({"commit": "abc", "device": "a CPU"}))
            rows = "".join(f"{step},{loss}\n" for step, loss in found.items())
            (own / "metrics.csv").write_text("step,val/loss\n" + rows)
            outcomes[each.name] = Outcome(own, diverged=100 not in found)
        return outcomes

    for module in (scaling, library_text):
        monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(scaling, "run_all", run_all)
    return commands


def test_compute_scaling_from_runs_to_files(tmp_path, monkeypatch, capsys):
    def losses(member, connection, seed):
        if (member, connection, seed) == ("3m", "hc", 2):
            return {}
        place = list(FLOPS).index(member)
        gap = {"residual": 0.0, "hc": -0.01, "mhc": -0.02}[connection] * (1 + place)
        return {50: 9.0, 100: 3.0 - 0.5 * place + 0.1 * seed + gap}

    commands = stand_in(monkeypatch, losses)
    monkeypatch.chdir(tmp_path)
    compute_scaling.main(["output=here", "seeds=1,2"])
    assert [words[0] for words in commands] == ["plan"] * 12 + ["prepare"]
    record = json.loads(Path("here/results/compute_scaling.json").read_text())
    assert Path("here/results/compute_scaling.png").stat().st_size > 10_000
    points = {(p["member"], p["connection"]): p for p in record["points"]}
    assert len(points) == 12 and "gap" not in points["3m", "residual"]
    mhc = points["700k", "mhc"]
    assert (mhc["tokens"], mhc["flops"]) == (10_000, 110 * 10_000)
    assert mhc["gap"]["mean"] == pytest.approx(-0.04)
    assert mhc["ratio_percent"]["by_seed"]["1"] == pytest.approx(100 * (1 - 0.04 / 2.6))
    assert record["commit"] == ["abc"] and record["device"] == ["a CPU"]
    assert record["command"].endswith(" output=here seeds=1,2")
    assert points["3m", "hc"]["diverged_seeds"] == [2]
    fits = {(fit["quantity"], fit["connection"]): fit["fit"] for fit in record["fits"]}
    assert set(fits) == {
        *(("gap", name) for name in ("hc", "mhc")),
        *(("ratio_percent", name) for name in ("hc", "mhc")),
        *(("loss", name) for name in ("residual", "hc", "mhc")),
    }
    slope = fits["gap", "mhc"]["slope"]  # each member costs ten times the one before
    assert (slope["mean"], slope["low"], slope["high"]) == pytest.approx((-0.02, -0.02, -0.02))
    assert fits["gap", "hc"]["seeds"] == [1] and fits["gap", "mhc"]["seeds"] == [1, 2]
    assert fits["loss", "residual"]["exponent"]["mean"] > 0
    printed = capsys.readouterr().out
    (row,) = [r for r in printed.splitlines() if r.startswith("3m") and " hc " in r]
    assert row.endswith("1, diverged: 2")


def test_token_scaling_from_runs_to_files(tmp_path, monkeypatch):
    def losses(member, connection, seed):
        slope = {"residual": 0.0, "hc": -0.01, "mhc": -0.02}[connection]
        found = {step: 5.0 + seed + slope * math.log10(step) for step in (25, 50, 75)}
        for step in (10, 90, 100):  # beside the part that lines are fitted to
            found[step] = 2.0 + seed + (connection != "residual")
        if (connection, seed) == ("hc", 3):
            del found[75], found[90], found[100]
        return found

    stand_in(monkeypatch, losses)
    monkeypatch.chdir(tmp_path)
    token_scaling.main(["output=here", "data.path=mine"])
    record = json.loads(Path("here/results/token_scaling.json").read_text())
    assert Path("here/results/token_scaling.png").stat().st_size > 10_000
    points = {(p["step"], p["connection"]): p for p in record["points"]}
    assert len(points) == 18
    assert points[100, "hc"]["diverged_seeds"] == [3] and not points[10, "hc"]["diverged_seeds"]
    fits = {(fit["quantity"], fit["connection"]): fit["fit"] for fit in record["fits"]}
    assert fits["gap", "mhc"]["slope"]["mean"] == pytest.approx(-0.02)
    assert fits["gap", "mhc"]["seeds"] == [1, 2, 3] and fits["gap", "hc"]["seeds"] == [1, 2]


def test_a_power_law_is_found_again():
    from gaps import Cost, Measured, points_at
    from scaling_results import described_power_law

    points = []
    for flops_per_token in (10, 1000, 100_000):
        runs = {
            ("residual", seed): Measured({1: 4.0 * (flops_per_token / 1000) ** -exponent}, 1, 1)
            for seed, exponent in ((1, 0.1), (2, 0.12))
        }
        points += points_at("x", 1, runs, {"residual": Cost({}, flops_per_token)})
    fit = described_power_law("residual", points)["fit"]
    assert fit["centre"] == pytest.approx(1000) and fit["factor"]["mean"] == pytest.approx(4.0)
    half = 12.706 * 0.01  # Student's t with one degree of freedom, standard error 0.01
    expected = [0.11 - half, 0.11, 0.11 + half]
    assert [fit["exponent"][end] for end in ("low", "mean", "high")] == pytest.approx(expected)


@pytest.mark.slow
def test_a_second_call_only_measures_again(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = [
        *("members=200k", "seeds=1", "only=mhc", "trainer.max_steps=2"),
        *("data.validation_sequences=8",),
    ]
    records = []
    for _ in range(2):
        compute_scaling.main(words)
        file = Path("runs/compute_scaling/cpu/results/compute_scaling.json")
        records.append(json.loads(file.read_text()))
    assert records[0] == records[1]
    assert capfd.readouterr().err.count("has ended before") == 2
    baseline, mhc = records[0]["points"]
    assert baseline["tokens"] == mhc["tokens"] == 2 * 1024
    assert mhc["flops"] == mhc["flops_per_token"] * 2048 > baseline["flops"] > 0
    assert 0 < mhc["loss"]["mean"] < 10 and mhc["gap"]["low"] is None
