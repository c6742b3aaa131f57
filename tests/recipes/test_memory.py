"""The recipe memory: what it trains at equal parameters, and what it makes of known losses."""

import functools
import json
from pathlib import Path

import budget
import laws
import numpy as np
import parts
import pytest
import subwords
import sweep
import torch
import yaml
from gaps import Cost

import memory
from mhc_lightning.cli.arguments import parse_arguments
from mhc_lightning.cli.components import build_model
from mhc_lightning.cli.composition import compose_experiment
from mhc_lightning.data.tokenizers import JsonTokenizer
from mhc_lightning.modules import MixtureOfExperts, NgramTable


@functools.cache
def composed(config, overrides):
    return compose_experiment(parse_arguments(["fit", "--config", str(config), *overrides]))


@pytest.fixture(autouse=True)
def read_here(monkeypatch):
    """Sizes are read in this process."""

    def run(words, **_):
        config, overrides = words[words.index("--config") + 1], tuple(words[6:-1])
        text = yaml.safe_dump(composed(config, overrides).values())
        return type("Done", (), {"returncode": 0, "stdout": text})

    monkeypatch.setattr(budget.subprocess, "run", run)


def network_of(variant):
    with torch.device("meta"):
        return build_model(composed(variant.config, variant.overrides)).model


def no_cost(config, overrides):
    return Cost({"total": 1}, 1)


def sparse_parameters(network):
    """Of experts that a token does not pass, and of tables."""
    total = 0
    for module in network.modules():
        if isinstance(module, MixtureOfExperts):
            inactive = module.num_experts - module.num_active_experts
            total += inactive * (module.gate_up[0].numel() + module.down[0].numel())
        elif isinstance(module, NgramTable):
            total += module.weight.numel()
    return total


def test_allocation_moves_a_fixed_number_of_sparse_parameters():
    variants = parts.allocation((), no_cost)
    networks = [network_of(variant) for variant in variants]
    budgets = [sparse_parameters(network) for network in networks]
    assert budgets == pytest.approx([budgets[0]] * len(budgets), rel=0.01)
    tables = [
        sum(m.weight.numel() for m in n.modules() if isinstance(m, NgramTable)) for n in networks
    ]
    shares = [1 - t / b for t, b in zip(tables, budgets, strict=True)]
    assert shares == pytest.approx([v.place for v in variants], abs=0.01)
    assert [v.place for v in variants] == pytest.approx(list(parts.SHARES), abs=0.01)


def test_what_for_spends_the_same_number_of_parameters_in_each_place():
    variants = parts.what_for((), no_cost)
    sizes = [sum(p.numel() for p in network_of(v).parameters()) for v in variants]
    extra = [size - sizes[0] for size in sizes[1:]]
    assert len(extra) == 4 and extra == pytest.approx([extra[0]] * 4, rel=0.01)


def test_what_costs_more_trains_for_as_many_flops():
    def costs(config, overrides):
        dear = {"over_encoding": 100, "engram": 125, "model.num_shared": 200}
        found = [flops for word, flops in dear.items() if any(word in o for o in overrides)]
        return Cost({"total": 1}, found[0] if found else 100)

    variants = {v.name: v for v in parts.what_for(("trainer.max_steps=1000",), costs)}
    assert list(variants)[5:] == ["ffn, equal FLOPs", "engram, equal FLOPs"]
    for name, steps in (("ffn", 500), ("engram", 800)):
        values = composed(
            variants[name].config, variants[f"{name}, equal FLOPs"].overrides
        ).values()
        assert values["trainer"]["max_steps"] == values["trainer"]["val_check_interval"] == steps


@pytest.mark.parametrize("part", parts.PARTS)
def test_a_parts_runs_can_be_built_and_share_nothing_by_mistake(part):
    variants = parts.PARTS[part]((), no_cost)
    names = {variant.name for variant in variants}
    assert len(names) == len(variants) == len({v.run for v in variants})
    assert all(v.baseline is None or v.baseline in names for v in variants)
    for variant in variants:
        network_of(variant)


def test_parts_that_train_the_same_share_its_runs():
    words = ("connection=residual",)
    found: dict[str, parts.Variant] = {}
    for part in ("scaling", "where", "connections"):
        for variant in parts.PARTS[part](words, no_cost):
            known = found.setdefault(variant.run, variant)
            assert (known.config, known.overrides) == (variant.config, variant.overrides)
    assert len(found) < 11 + 8 + 9


def stand_in(monkeypatch, losses):
    """Runs that come to `losses(variant's run, seed)`; None: diverged."""

    def run_all(runs, folder, *_):
        outcomes = {}
        for each in runs:
            name, _, seed = each.name.rpartition("_seed")
            loss = losses(name, int(seed))
            own = folder / each.name
            own.mkdir(parents=True, exist_ok=True)
            words = dict(word.split("=", 1) for word in each.overrides)
            steps = int(words.get("trainer.max_steps", 1000))
            data = {"batch_size": 10, "sequence_length": 10, "validation_sequences": None}
            config = {"data": data, "trainer": {"max_steps": steps}}
            (own / "config.yaml").write_text(yaml.safe_dump(config))
            (own / "environment.json").write_text(json.dumps({"commit": "abc", "device": "a CPU"}))
            row = "" if loss is None else f"{steps},{loss}\n"
            (own / "metrics.csv").write_text("step,val/loss\n" + row)
            outcomes[each.name] = sweep.Outcome(own, loss is None)
        return outcomes

    monkeypatch.setattr(memory, "run_all", run_all)
    monkeypatch.setattr(memory, "plan_cost", no_cost)
    monkeypatch.setattr(memory, "prepare_subwords", lambda *_: None)


def record_of(part, tmp_path, *words):
    memory.main([f"part={part}", f"output={tmp_path}", *words])
    assert (tmp_path / f"results/{part}.png").stat().st_size > 10_000
    return json.loads((tmp_path / f"results/{part}.json").read_text())


def test_a_valley_of_allocation_is_found_and_a_slope_is_none(tmp_path, monkeypatch):
    def valley(name, seed):
        share = float(name.removeprefix("allocation_"))
        return 3 + 0.1 * seed + (share - 0.7) ** 2

    stand_in(monkeypatch, valley)
    record = record_of("allocation", tmp_path, "seeds=1,2")
    assert record["valley"] is True
    assert record["best_share"] == pytest.approx(0.7, abs=0.01)
    lowest = record["parabolas"]["lowest_share"]
    # shares are rounded to whole experts
    assert lowest["mean"] == pytest.approx(0.7, abs=0.02)
    ends = [gap["mean"] for gap in record["first_and_last_minus_best"]]
    assert ends == pytest.approx([0.09, 0.09])
    half = {v["variant"]: v["gap"]["mean"] for v in record["variants"][1:]}["50%"]
    assert half == pytest.approx(0.04 - 0.09)

    stand_in(monkeypatch, lambda name, seed: 3 - float(name.removeprefix("allocation_")))
    record = record_of("allocation", tmp_path / "slope", "seeds=1,2")
    assert record["valley"] is False and record["best_share"] == 1.0
    assert record["parabolas"]["seeds_with_a_minimum_inside"] == []


def test_a_logarithmic_law_is_found_again(tmp_path, monkeypatch):
    slopes = {"engram": -0.05, "over": -0.02}

    def losses(name, seed):
        if name == "dense_none":
            return 3.0
        if (name, seed) == ("dense_over_encoding_1031", 2):
            return None
        return 3 + seed + slopes[name.split("_")[1]] * np.log10(int(name.rpartition("_")[2]))

    stand_in(monkeypatch, losses)
    record = record_of("scaling", tmp_path)
    assert record["fits"]["engram"]["slope"]["mean"] == pytest.approx(-0.05)
    assert record["fits"]["over_encoding"]["slope"]["mean"] == pytest.approx(-0.02)
    assert record["fits"]["engram"]["seeds"] == [1, 2, 3]
    assert record["fits"]["over_encoding"]["seeds"] == [1, 3]
    assert record["fits"]["engram"]["deviation"] == pytest.approx(0, abs=1e-12)
    (broken,) = [v for v in record["variants"] if v["diverged_seeds"]]
    assert broken["variant"] == "over_encoding 1,031" and broken["diverged_seeds"] == [2]


def test_losses_are_compared_at_equal_tokens_and_at_equal_flops(tmp_path, monkeypatch):
    known = {"none": 3.0, "ffn": 2.7, "experts": 2.9, "over_encoding": 2.95, "engram": 2.8}

    def losses(name, seed):
        name = name.removeprefix("what_for_")
        short = name.removesuffix("_equal_flops")
        return known[short] + (0.2 if short != name else 0.0) + 0.01 * seed

    stand_in(monkeypatch, losses)
    monkeypatch.setattr(
        memory,
        "plan_cost",
        lambda _, words: Cost({"total": 1}, 2 if any("shared" in w for w in words) else 1),
    )
    record = record_of("what_for", tmp_path)
    assert [v["variant"] for v in record["variants"]] == [*known, "ffn, equal FLOPs"]
    minus = record["engram_minus"]
    assert minus["equal_tokens"]["ffn"]["mean"] == pytest.approx(0.1)
    assert minus["equal_flops"]["ffn"]["mean"] == pytest.approx(-0.1)
    for account in minus.values():
        assert account["experts"]["mean"] == pytest.approx(-0.1)


def test_a_memory_is_compared_with_its_own_connection(tmp_path, monkeypatch):
    level = {"dense_none": 3.0, "dense_hc_none": 4.0, "dense_mhc_none": 5.0}
    stand_in(monkeypatch, lambda name, seed: level.get(name, 2.5) + seed)
    record = record_of("connections", tmp_path, "seeds=1,2")
    gaps = {v["variant"]: v["gap"]["mean"] for v in record["variants"] if "gap" in v}
    assert gaps["residual, engram"] == pytest.approx(-0.5)
    assert gaps["mhc, over_encoding"] == pytest.approx(-2.5)
    record = record_of("where", tmp_path, "seeds=1")
    assert record["paper"] == json.loads(json.dumps(laws.PAPER["where"]))
    assert record["variants"][1]["gap"]["low"] is None


def test_a_tokenizer_learns_words_and_ends_documents(tmp_path):
    subwords.learn(["def read(self):\n    return self\n"] * 20, 300).save(
        str(tmp_path / "tokenizer.json")
    )
    tokenizer = JsonTokenizer(tmp_path / "tokenizer.json")
    text = "def read(self):\n    return selfé\n"
    tokens = tokenizer.encode(text)
    assert len(tokens) < len(text) / 2 and tokenizer.decode(tokens) == text
    assert tokenizer.vocab_size <= 300 and tokenizer.end_of_document not in tokens


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["part=when"], "part=when is not known; choose from allocation, .*"),
        (["memory=none"], "memory= differs between the runs; say part=where instead"),
        (["part=connections", "connection=mhc"], "connection= differs between the runs .*"),
        (["part=allocation", "model.ffn_dim=1"], ".* parameters are too few .*"),
    ],
)
def test_a_mistake_is_one_line(words, message):
    with pytest.raises(SystemExit, match=rf"^error: {message}$"):
        memory.main(words)


@pytest.mark.slow
def test_a_second_call_only_measures_again(tmp_path, monkeypatch, capfd):
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    words = [
        *("part=where", "seeds=1", "model.num_layers=2", "trainer.max_steps=2"),
        *("trainer.val_check_interval=2", "data.validation_sequences=8"),
    ]
    records = []
    for _ in range(2):
        memory.main(words)
        file = Path("runs/memory/cpu/results/where.json")
        records.append(json.loads(file.read_text()))
    assert records[0] == records[1]
    assert capfd.readouterr().err.count("has ended before") == len(records[0]["variants"])
    assert all(0 < v["loss"]["mean"] < 10 for v in records[0]["variants"])
