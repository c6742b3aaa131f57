"""An injected explosion is caught by every action; a healthy run raises nothing."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from mhc_lightning import LanguageModel
from mhc_lightning.callbacks import AmaxGain, StabilityAlarm
from mhc_lightning.checkpoints.run_checkpoint import RunCheckpoint
from mhc_lightning.errors import NonFiniteLossError, UserError
from mhc_lightning.loggers import MetricsCSV
from mhc_lightning.modules import HyperConnection, ManifoldHyperConnection, ResidualConnection
from mhc_lightning.optimizers.recipes import AdamWRecipe, MuonRecipe, OptimizerRecipe

INTERVAL = 2  # optimizer steps between samples of the gains
BACKWARD = "amax_gain/composite/backward"


class Progressions(IterableDataset):
    """Arithmetic progressions modulo 40, the k-th a function of k: something to learn."""

    def __init__(self, start: int, seed: int) -> None:
        self.start, self.seed = start, seed

    def __iter__(self) -> Any:
        k = self.start
        while True:
            generator = torch.Generator().manual_seed(7919 * self.seed + k)
            first, by = torch.randint(0, 40, (2,), generator=generator)
            yield (first + (1 + by % 5) * torch.arange(9)) % 40
            k += 1


class Data(pl.LightningDataModule):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        done = 4 * self.trainer.global_step * self.trainer.accumulate_grad_batches
        return DataLoader(Progressions(done, self.seed), batch_size=4)


class Injection(pl.Callback):
    """Scales up a matrix as one step begins, and keeps copies of weights and optimizer."""

    def __init__(self, step: int, parameter: str, factor: float) -> None:
        self.step, self.parameter, self.factor = step, parameter, factor
        self.before: list[Any] = []
        self.after: list[Any] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step + 1 == self.step:
            with torch.no_grad():
                pl_module.get_parameter(self.parameter).mul_(self.factor)
            self.before = everything(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.after = everything(trainer)


def everything(trainer: pl.Trainer) -> list[Any]:
    states = (trainer.lightning_module.state_dict(), trainer.optimizers[0].state_dict()["state"])
    return copy.deepcopy(list(states))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


# Residual weights, the gates of the dynamic ones, and an ordinary matrix.
RESIDUAL = (HyperConnection, "model.blocks.1.attention_connection.bias", 30.0)
GATES = (HyperConnection, "model.blocks.0.feed_forward_connection.alpha", 1e4)
WEIGHT = (ManifoldHyperConnection, "model.output.weight", 100.0)


@pytest.fixture
def train(tiny_transformer: Any, tmp_path: Path) -> Any:
    """Returns a function: train a tiny model under an alarm, with loggers in a folder."""

    def run(
        alarm: StabilityAlarm | None,
        *callbacks: pl.Callback,
        steps: int = 48,
        seed: int = 0,
        connection: type = ManifoldHyperConnection,
        optimizer: OptimizerRecipe | None = None,
        model: type[LanguageModel] = LanguageModel,
        folder: str = "run",
        network: dict[str, Any] | None = None,
        resume: Path | None = None,
        **options: Any,
    ) -> pl.Trainer:
        sizes = {"num_experts": 0, "num_streams": 2, "dim": 8, "ffn_dim": 8, **(network or {})}
        streams = 1 if connection is ResidualConnection else sizes.pop("num_streams")
        made = tiny_transformer(connection=connection, **{**sizes, "num_streams": streams})
        recipe = optimizer or AdamWRecipe(lr=1e-2, warmup_steps=10, eps=1e-8, schedule="constant")
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            gradient_clip_val=1.0,
            logger=[MetricsCSV(tmp_path / folder)],
            log_every_n_steps=INTERVAL,
            callbacks=[AmaxGain(), *([alarm] if alarm else []), *callbacks],
            enable_checkpointing=any(isinstance(c, RunCheckpoint) for c in callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path / folder,
            **options,
        )
        module = model(made, recipe)
        trainer.fit(module, datamodule=Data(seed), ckpt_path=resume, weights_only=False)
        return trainer

    return run


def rows(folder: Path) -> dict[int, dict[str, float]]:
    lines = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    return {
        int(line[0]): {tag: float(v) for tag, v in zip(lines[0], line, strict=True) if v}
        for line in lines[1:]
    }


@pytest.mark.parametrize(
    ("connection", "seed"),
    [
        (ManifoldHyperConnection, 1),
        (ResidualConnection, 3),
        *(pytest.param(ManifoldHyperConnection, s, marks=pytest.mark.slow) for s in range(4, 9)),
    ],
)
def test_a_healthy_run_raises_nothing(
    connection: type, seed: int, train: Any, tmp_path: Path, capsys: Any
) -> None:
    """Through a warm-up, the steep fall after it, and the steps of the learning rate."""
    torch.manual_seed(seed)
    alarm = StabilityAlarm(["warn", "checkpoint", "skip_update", "lower_lr"], window=32)
    trainer = train(
        alarm,
        steps=120,
        seed=seed,
        connection=connection,
        optimizer=AdamWRecipe(lr=1e-2, warmup_steps=20, eps=1e-8),
    )
    assert alarm.interventions == [] and alarm.skipped_updates == 0
    assert "alarm" not in capsys.readouterr().err
    table = rows(tmp_path / "run")
    assert not any(tag.startswith("alarm/") for row in table.values() for tag in row)
    assert table[120]["train/loss"] < 0.9 * table[4]["train/loss"]  # it has learnt meanwhile
    assert table[120]["train/learning_rate"] == pytest.approx(1e-3)
    assert trainer.global_step == 120


@pytest.mark.parametrize(("connection", "parameter", "factor"), [RESIDUAL, GATES, WEIGHT])
def test_an_explosion_is_caught_with_its_evidence(
    connection: type, parameter: str, factor: float, train: Any, tmp_path: Path, capsys: Any
) -> None:
    alarm = StabilityAlarm(window=32)
    train(alarm, Injection(25, parameter, factor), connection=connection, steps=30)
    steps = [step for step, _ in alarm.interventions]
    assert steps and 25 <= min(steps) <= max(steps) < 25 + INTERVAL
    text = " ".join(text for _, text in alarm.interventions)
    of_streams = "connection" in parameter
    tag = BACKWARD if of_streams else "train/loss"
    assert f"{tag} " in text and "nothing done" in text
    assert ("sub-layers " if of_streams else "largest gradient in model.") in text
    lines = capsys.readouterr().err.splitlines()
    assert lines[-len(steps) :] == [f"alarm: step {s}: {t}" for s, t in alarm.interventions]
    at = next(step for step, text in alarm.interventions if f"{tag} " in text)
    row = rows(tmp_path / "run")[at]
    assert row[f"alarm/{tag}"] > row[f"alarm/{tag}/bound"] > 0
    if tag in row:  # logged on logging steps only
        assert row[f"alarm/{tag}"] == row[tag]
    assert row["alarm/skipped_updates"] == 0 and row["alarm/lr_scale"] == 1


@pytest.mark.parametrize(("optimizer", "accumulate"), [(AdamWRecipe, 2), (MuonRecipe, 1)])
def test_a_skipped_update_changes_nothing_and_counts(
    optimizer: type[OptimizerRecipe], accumulate: int, train: Any
) -> None:
    """Neither weights nor moments, nor the experts' biases; the schedule goes on."""
    recipe = optimizer(lr=1e-2, warmup_steps=40, eps=1e-8, schedule="constant")
    injection = Injection(25, "model.output.weight", 100.0)
    alarm = StabilityAlarm(["skip_update"], window=32, max_skips=2)
    trainer = train(
        alarm,
        injection,
        steps=27,
        optimizer=recipe,
        network={"num_experts": 4},
        accumulate_grad_batches=accumulate,
    )
    assert [step for step, _ in alarm.interventions] == [25, 26]
    assert alarm.interventions[0][1].endswith(": update skipped")
    assert same(injection.before, injection.after)
    assert not same(injection.after, everything(trainer))  # at last updates are made again
    assert alarm.skipped_updates == 2 and trainer.global_step == 27
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 27
    moments = trainer.optimizers[0].state_dict()["state"].values()
    assert {int(state["step"]) for state in moments if "step" in state} == {25}


def test_a_lowered_learning_rate_is_on_top_of_the_schedule(train: Any, tmp_path: Path) -> None:
    alarm = StabilityAlarm(["lower_lr"], window=32, lr_factor=0.25, lr_recovery_steps=12)
    recipe = AdamWRecipe(lr=1e-2, warmup_steps=10, eps=1e-8, schedule="cosine")
    trainer = train(alarm, Injection(25, *RESIDUAL[1:]), connection=RESIDUAL[0], steps=40,
                    optimizer=recipe)  # fmt: skip
    ((at, text),) = alarm.interventions
    assert at == 26 and "learning rate times 0.25, back within 12 steps" in text
    table = rows(tmp_path / "run")
    for step in (24, 26, 28, 32, 36, 38, 40):
        scale = 1 if step <= at else min(1.0, 0.25 + 0.75 * (step - at) / 12)
        expected = 1e-2 * recipe.learning_rate.factor(step - 1, 40) * scale
        assert table[step]["train/learning_rate"] == pytest.approx(expected, rel=1e-5)
    # What is kept for the next step, and in checkpoints, is the schedule's.
    group = trainer.optimizers[0].param_groups[0]
    assert group["lr"] == pytest.approx(1e-2 * recipe.learning_rate.factor(40, 40))


def test_the_state_is_saved_and_kept_with_the_one_before(train: Any, tmp_path: Path) -> None:
    saver = RunCheckpoint(tmp_path / "saved", every_n_steps=20, keep_last=1)
    alarm = StabilityAlarm(["checkpoint"], window=32)
    train(alarm, Injection(42, *WEIGHT[1:]), saver, steps=50)
    assert [step for step, _ in alarm.interventions] == [42]
    kept = sorted(int(file.stem[5:]) for file in (tmp_path / "saved").glob("step_*.ckpt"))
    assert kept == [40, 42, 50]
    loaded = torch.load(tmp_path / "saved/step_00000042.ckpt", weights_only=True)
    assert loaded["global_step"] == 42
    resumed = RunCheckpoint(tmp_path / "saved", every_n_steps=20, keep_last=1)
    train(None, resumed, steps=60, resume=tmp_path / "saved/step_00000050.ckpt", folder="more")
    kept = sorted(int(file.stem[5:]) for file in (tmp_path / "saved").glob("step_*.ckpt"))
    assert kept == [40, 42, 60]


class Poisoned(LanguageModel):
    """Its loss is not finite in some steps."""

    steps: tuple[int, ...] = (12,)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.global_step + 1 not in self.steps:
            return loss
        self._step_losses[-1] = loss.detach() * math.nan
        return loss * math.nan


class PoisonedForLong(Poisoned):
    steps = tuple(range(12, 30))


def test_a_step_that_is_not_finite_can_be_skipped_but_not_for_ever(train: Any) -> None:
    alarm = StabilityAlarm(["skip_update"], window=32)
    trainer = train(alarm, model=Poisoned, steps=16)
    assert alarm.skipped_updates == 1 and trainer.global_step == 16
    assert "gradients not finite" in alarm.interventions[0][1]
    state = trainer.lightning_module.state_dict()
    assert all(bool(value.isfinite().all()) for value in state.values())

    alarm = StabilityAlarm(["skip_update"], window=32, max_skips=3)
    with pytest.raises(NonFiniteLossError, match="at step 15"):
        train(alarm, model=PoisonedForLong)
    assert alarm.skipped_updates == 3
    with pytest.raises(NonFiniteLossError, match="at step 12"):
        train(StabilityAlarm(["warn", "lower_lr"], window=32), model=Poisoned)


def test_a_run_goes_on_through_an_alarm_bit_for_bit(train: Any, tmp_path: Path) -> None:
    """Resumed with updates skipped, a learning rate on its way back, and a pause."""

    def go(folder: str, steps: int, resume: Path | None = None) -> StabilityAlarm:
        alarm = StabilityAlarm(
            ["warn", "skip_update", "lower_lr"], window=32, max_skips=3, cooldown=12,
            lr_recovery_steps=30,
        )  # fmt: skip
        saver = RunCheckpoint(tmp_path / folder / "checkpoints", every_n_steps=23)
        train(alarm, Injection(22, *WEIGHT[1:]), saver, connection=WEIGHT[0], steps=steps,
              folder=folder, resume=resume)  # fmt: skip
        return alarm

    whole = go("whole", 40)
    assert [step for step, _ in whole.interventions][:3] == [22, 23, 24]
    checkpoint = tmp_path / "whole/checkpoints/step_00000023.ckpt"
    rest = go("rest", 40, checkpoint)
    assert rest.interventions == [(s, text) for s, text in whole.interventions if s > 23]
    assert rest.state_dict() == whole.state_dict()
    table = rows(tmp_path / "whole")
    assert rows(tmp_path / "rest") == {step: row for step, row in table.items() if step > 23}


# ---- other people's projects


class OtherNames:
    """Mixed into a foreign module: logs under names of its own, the norm with Lightning's hook."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        norms = [p.grad.norm() for p in self.parameters() if p.grad is not None]  # type: ignore[attr-defined]
        self.log("norm", torch.stack(norms).norm())  # type: ignore[attr-defined]


def test_works_in_a_foreign_project(foreign: Any, fit: Any, tmp_path: Path) -> None:
    class Module(OtherNames, foreign.Module):
        pass

    alarm = StabilityAlarm(
        ["checkpoint", "skip_update"], loss="train/loss", grad_norm="norm", window=32
    )
    module = Module()
    injection = Injection(20, "mixers.1.body.weight", 1e4)
    # In the other order, gains are judged a step later.
    fit(module, alarm, AmaxGain(), injection, max_steps=30, log_every_n_steps=1)
    assert alarm.interventions[0][0] == 20
    assert "norm " in alarm.interventions[0][1] and "train/loss " in alarm.interventions[0][1]
    assert same(injection.before, injection.after)
    assert (tmp_path / "alarm_step_00000020.ckpt").is_file()
    assert "optimizer_step" not in vars(module)  # left as it was

    folder = tmp_path / "saved"
    lowering = StabilityAlarm(["checkpoint", "lower_lr"], window=32)
    trainer = fit(foreign.Module(), lowering, AmaxGain(),
                  Injection(20, "mixers.1.body.weight", 1e4), ModelCheckpoint(folder),
                  max_steps=24, enable_checkpointing=True)  # fmt: skip
    assert (folder / "alarm_step_00000020.ckpt").is_file()
    assert "learning rate times" in lowering.interventions[0][1]
    # Without a schedule, too, each update's rate is restored.
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.001


def test_says_what_it_cannot_watch(foreign: Any, fit: Any) -> None:
    with pytest.warns(UserWarning, match="cannot watch train/grad_norm.*train/loss"):
        fit(foreign.Module(), StabilityAlarm(), AmaxGain(), max_steps=2)
    with pytest.warns(UserWarning, match="watches no gains"):
        fit(foreign.Module(), StabilityAlarm(grad_norm=None), max_steps=2)


def test_a_module_that_optimizes_by_hand_is_watched_after_its_steps(foreign: Any, fit: Any) -> None:
    alarm = StabilityAlarm(grad_norm=None, window=32)
    fit(foreign.Module(manual=2), AmaxGain(), alarm,
        Injection(12, "mixers.1.body.weight", 1e4), max_steps=14)  # fmt: skip
    assert alarm.interventions[0][0] == 12
    with pytest.raises(UserError, match="by hand"):
        fit(foreign.Module(manual=2), AmaxGain(), StabilityAlarm(["skip_update"]))


SCRIPT = Path(__file__).with_name("alarm_in_processes.py")


@pytest.mark.parametrize(
    "strategies",
    [["ddp"], pytest.param(["fsdp", "pipeline"], marks=pytest.mark.slow)],
)
def test_processes_decide_alike(strategies: list[str], tmp_path: Path) -> None:
    """In step 20 a matrix is a hundredfold; in step 25 one process alone finds its loss NaN."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), str(tmp_path), *strategies],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stderr.count("alarm: step 20: ") == len(strategies)  # said once
    for name in strategies:
        one, two = (json.loads((tmp_path / f"{name}_{k}.json").read_text()) for k in range(2))
        gains = [process.pop("gain") for process in (one, two)]
        assert one == two
        # Ranks sample each their own micro-batch, the stages of a pipeline the same one; loggers
        # write the first process's.
        assert (gains[0] == gains[1]) == (name == "pipeline")
        assert rows(tmp_path / name)[28][BACKWARD] == gains[0]
        assert one["tokens"] == 28 * 8 * 8  # steps, sequences, tokens
        assert [step for step, _ in one["interventions"]] == [20, 25]
        assert "largest gradient in model." in one["interventions"][0][1]
        assert "train/loss nan" in one["interventions"][1][1]
        assert one["step"] == 28 and one["state"]["skipped_updates"] == 2
        saved = {name.removesuffix(".ckpt") for name in one["saved"]}  # or folders of shards
        assert {"step_00000020", "step_00000025"} <= saved
        assert one["rates"][19:21] == pytest.approx([1e-3, 0.5e-3 * 1.001])
