"""Every shipped experiment and every choice of a group composes, builds and trains."""

import contextlib
import csv
import json
import signal

import pytest
from omegaconf import OmegaConf
from pretrained import tiny_pretrained

from mhc_lightning import LanguageModel
from mhc_lightning.cli.arguments import parse_arguments
from mhc_lightning.cli.components import build_model, build_trainer
from mhc_lightning.cli.composition import compose_experiment
from mhc_lightning.cli.experiments import (
    group_choices,
    shipped_experiments,
    shipped_folder,
)
from mhc_lightning.cli.instantiation import build, build_members
from mhc_lightning.cli.main import main
from mhc_lightning.data import prepare
from mhc_lightning.modules import Connection

EXPERIMENTS = sorted(shipped_experiments())

GROUPS = "model connection memory data optimizer trainer strategy callbacks logger checkpoint"
SMALL = ("baseline_quickstart", "hc_quickstart", "mhc_moe_tiny", "mhc_quickstart")

# Their networks are read from files, with the sizes these have: tests/cli/test_upcycle.py.
PRETRAINED = ("mhc_upcycle",)

# What outside scripts may set in any experiment, to shrink it.
CONTRACT = """
seed output_dir ckpt_path compile recompute overwrite connection model.num_streams
optimizer.lr optimizer.warmup_steps
data.path data.batch_size data.micro_batch_size data.sequence_length
trainer.max_steps trainer.accelerator trainer.devices trainer.val_check_interval
trainer.log_every_n_steps checkpoint.every_n_steps strategy
""".split()  # noqa: SIM905
SIZES = """
model.dim model.num_layers model.num_heads model.ffn_dim model.num_experts model.vocab_size
""".split()  # noqa: SIM905


def compose(name, *words, command="fit"):
    return compose_experiment(parse_arguments([command, "--config", name, *words]))


def test_there_are_experiments_with_a_line_about_each():
    assert {"mhc_quickstart", "hc_quickstart", "baseline_quickstart"} <= set(EXPERIMENTS)
    assert all(shipped_experiments().values())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_builds(name, tmp_path):
    words, keys = [], [*CONTRACT, *SIZES]
    if name in PRETRAINED:
        tiny_pretrained().save_pretrained(tmp_path / "pretrained")
        words, keys = [f"model.pretrained={tmp_path}/pretrained"], CONTRACT
    experiment = compose(name, f"output_dir={tmp_path}", *words)
    for key in keys:
        assert OmegaConf.select(experiment.config, key, default="absent") != "absent", key
    module = build_model(experiment, on_meta=True)  # some are large
    assert isinstance(module, LanguageModel)
    assert len(build_members(experiment, "callbacks")) > 2
    assert len(build_members(experiment, "logger")) == 2
    build(experiment, "checkpoint")
    build_trainer(experiment, logger=False)


@pytest.mark.parametrize(
    ("group", "choice"),
    [
        (group, choice)
        for group, choices in group_choices([shipped_folder()]).items()
        if group in GROUPS.split()
        for choice in choices
    ],
)
def test_every_choice_of_every_group_composes(group, choice):
    # A family leaves its members' sizes open.
    words = "model.dim=16 model.num_layers=2 model.num_heads=2 model.ffn_dim=16 model.num_experts=0"
    if (group, choice) == ("model", "pretrained"):
        words = "model.pretrained=anything"
    experiment = compose("mhc_quickstart", f"{group}={choice}", *words.split())
    assert group in experiment.config


def test_only_the_connection_differs_between_the_quickstarts():
    def rest(name):
        values = compose(name).values()
        for key in ("connection", "output_dir", "checkpoint", "logger"):
            values.pop(key)
        values["model"].pop("connection")
        return values

    assert rest("mhc_quickstart") == rest("baseline_quickstart") == rest("hc_quickstart")


# Sizes that any experiment trains with in seconds.
SHRUNK = """
model.dim=16 model.num_layers=2 model.num_heads=2 model.ffn_dim=16 model.vocab_size=257
data.batch_size=2 data.micro_batch_size=1 data.sequence_length=16 data.num_workers=0
trainer.max_steps=2 trainer.val_check_interval=2 trainer.log_every_n_steps=1
trainer.accelerator=cpu trainer.devices=1 optimizer.warmup_steps=1 checkpoint.every_n_steps=1
""".split()  # noqa: SIM905


# Drawing takes longer than two steps.
NO_PICTURES = ("callbacks.stream_matrices=null", "callbacks.dashboard=null")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("To be, or not to be, that is the question. " * 200)
    prepare(folder / "text.txt", folder / "tokens", validation_fraction=0.2, num_workers=1,
            progress=False)  # fmt: skip
    return folder / "tokens"


@pytest.mark.parametrize(
    "name",
    [
        name if name in SMALL else pytest.param(name, marks=pytest.mark.slow)
        for name in EXPERIMENTS
        if name not in PRETRAINED
    ],
)
def test_every_experiment_trains_when_shrunk(name, data, tmp_path):
    words = ["recompute=off", *([] if name == "mhc_quickstart" else NO_PICTURES)]
    config = compose(name).config
    if config.model.num_experts:
        words.append("model.num_experts=8")
    if "rows" in config.memory:
        words.append("memory.rows=64")
    table = fit(name, data, tmp_path, *words)
    assert len(table) == 2 and "val/loss" in table[0]
    assert (tmp_path / "run/checkpoints/last").resolve().is_file()


def fit(name, data, folder, *words):
    """Two steps of a small model; the rows of its metrics."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.chdir(folder):
            command = ["fit", "--config", name, f"data.path={data}", "output_dir=run"]
            assert main([*command, *SHRUNK, *words]) == 0
    finally:
        signal.signal(signal.SIGTERM, handler)
    with open(folder / "run/metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


# Largest deviation of the composite gains from one, forward and backward, in two steps.
GAINS = {
    **dict.fromkeys(("residual", "identity"), (0, 0)),
    **dict.fromkeys(("mhc_lite", "krom"), (1e-5, 1e-5)),
    **dict.fromkeys(("mhc", "mhc_single_pass"), (1e-5, 1e-2)),
    **dict.fromkeys(("hc", "hc_linear", "hc_static"), (1, 1)),
}


@pytest.mark.parametrize("connection", group_choices([shipped_folder()])["connection"])
def test_every_connection_is_planned_trained_and_watched(connection, data, tmp_path, capsys):
    setting = f"connection={connection}"
    assert main(["plan", "--json", "--config", "mhc_quickstart", *SHRUNK, setting]) == 0
    plan = json.loads(capsys.readouterr().out)
    module = build_model(compose("mhc_quickstart", *SHRUNK, setting), on_meta=True)
    of_connections = sum(
        p.numel() for m in module.modules() if isinstance(m, Connection) for p in m.parameters()
    )
    assert plan["parameters"]["connections"] == of_connections
    assert plan["recompute_block"] == (0 if connection == "residual" else 2)
    for row in fit("mhc_quickstart", data, tmp_path, setting, "recompute=auto", *NO_PICTURES):
        for way, limit in zip(("forward", "backward"), GAINS[connection], strict=True):
            assert abs(float(row[f"amax_gain/composite/{way}"]) - 1) <= limit
