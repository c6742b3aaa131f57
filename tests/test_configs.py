import contextlib
import signal

import pytest
from omegaconf import OmegaConf

from mhc_lightning import LanguageModel
from mhc_lightning.cli.arguments import parse_arguments
from mhc_lightning.cli.building import build, build_members, build_model, build_trainer
from mhc_lightning.cli.composition import compose_experiment
from mhc_lightning.cli.experiments import (
    group_choices,
    shipped_experiments,
    shipped_folder,
)
from mhc_lightning.cli.main import main
from mhc_lightning.data import prepare

EXPERIMENTS = sorted(shipped_experiments())

GROUPS = "model connection data optimizer trainer strategy callbacks logger checkpoint"
SMALL = ("baseline_quickstart", "hc_quickstart", "mhc_moe_tiny", "mhc_quickstart")

# What outside scripts may set in any experiment, to shrink it.
CONTRACT = """
seed output_dir ckpt_path compile recompute overwrite connection
model.dim model.num_layers model.num_streams model.num_heads model.ffn_dim model.num_experts
model.vocab_size optimizer.lr optimizer.warmup_steps
data.path data.batch_size data.micro_batch_size data.sequence_length
trainer.max_steps trainer.accelerator trainer.devices trainer.val_check_interval
trainer.log_every_n_steps checkpoint.every_n_steps strategy
""".split()  # noqa: SIM905


def compose(name, *words, command="fit"):
    return compose_experiment(parse_arguments([command, "--config", name, *words]))


def test_there_are_experiments_with_a_line_about_each():
    assert {"mhc_quickstart", "hc_quickstart", "baseline_quickstart"} <= set(EXPERIMENTS)
    assert all(shipped_experiments().values())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_builds(name, tmp_path):
    experiment = compose(name, f"output_dir={tmp_path}")
    for key in CONTRACT:
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
    sizes = "model.dim=16 model.num_layers=2 model.num_heads=2 model.ffn_dim=16 model.num_experts=0"
    experiment = compose("mhc_quickstart", f"{group}={choice}", *sizes.split())
    assert group in experiment.config


def test_only_the_connection_differs_between_the_quickstarts():
    def rest(name):
        values = compose(name).values()
        for key in ("connection", "output_dir", "checkpoint", "logger"):
            values.pop(key)
        values["model"].pop("connection")
        return values

    assert rest("mhc_quickstart") == rest("baseline_quickstart") == rest("hc_quickstart")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("To be, or not to be, that is the question. " * 200)
    prepare(folder / "text.txt", folder / "tokens", validation_fraction=0.2, num_workers=1,
            progress=False)  # fmt: skip
    return folder / "tokens"


@pytest.mark.parametrize(
    "name",
    [n if n in SMALL else pytest.param(n, marks=pytest.mark.slow) for n in EXPERIMENTS],
)
def test_every_experiment_trains_when_shrunk(name, data, tmp_path):
    words = """
    model.dim=16 model.num_layers=2 model.num_heads=2 model.ffn_dim=16 model.vocab_size=257
    data.batch_size=2 data.micro_batch_size=1 data.sequence_length=16 data.num_workers=0
    trainer.max_steps=2 trainer.val_check_interval=2 trainer.log_every_n_steps=1
    trainer.accelerator=cpu trainer.devices=1 optimizer.warmup_steps=1 checkpoint.every_n_steps=1
    recompute=off
    """.split()  # noqa: SIM905
    if compose(name).config.model.num_experts:
        words.append("model.num_experts=8")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.chdir(tmp_path):
            command = ["fit", "--config", name, f"data.path={data}", "output_dir=run", *words]
            assert main(command) == 0
    finally:
        signal.signal(signal.SIGTERM, handler)
    table = (tmp_path / "run/metrics.csv").read_text().splitlines()
    assert len(table) == 3 and "val/loss" in table[0]
    assert (tmp_path / "run/checkpoints/last").resolve().is_file()
