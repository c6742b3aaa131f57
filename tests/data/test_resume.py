"""A resumed run sees exactly the batches, and reaches exactly the losses, of one never stopped."""

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from mhc_lightning import TextDataModule
from mhc_lightning.data import PreparedData, prepare
from mhc_lightning.errors import UserError

LENGTH = 1024
BATCH = 8
MICRO = 2


class Bigrams(L.LightningModule):
    """The smallest language model; remembers what it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(257, 257)
        self.batches: list[Tensor] = []
        self.losses: list[float] = []
        self.validated = 0

    def loss(self, batch: Tensor) -> Tensor:
        logits = self.table(batch[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.batches.append(batch.clone())
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.validated += len(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class EagerBigrams(Bigrams):
    """Has Lightning build the loaders before it restores the step."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.trainer.estimated_stepping_batches > 0
        return super().configure_optimizers()


def trainer(steps: int, accumulation: int = BATCH // MICRO, **options: Any) -> L.Trainer:
    return L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        accumulate_grad_batches=accumulation,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, "limit_val_batches": 0, **options},
    )


def run(
    data: TextDataModule, steps: int, checkpoint: Path | None = None, **options: Any
) -> Bigrams:
    model = options.pop("model", Bigrams)()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*resum.*")
        trainer(steps, **options).fit(model, datamodule=data, ckpt_path=checkpoint)
    return model


def module(path: Any, **options: Any) -> TextDataModule:
    return TextDataModule(path, **{"batch_size": BATCH, "micro_batch_size": MICRO, **options})


def assert_continues(resumed: Bigrams, whole: Bigrams, step: int) -> None:
    done = step * BATCH // MICRO
    assert len(resumed.batches) == len(whole.batches) - done > 0
    for one, other in zip(resumed.batches, whole.batches[done:], strict=True):
        assert torch.equal(one, other)
    assert resumed.losses == whole.losses[done:]
    assert torch.equal(resumed.table.weight, whole.table.weight)


class Whole:
    """A run that was never stopped, with its checkpoint after every step."""

    def __init__(self, path: Path, folder: Path, workers: int) -> None:
        self.folder = folder
        data = module(path, sequence_length=LENGTH, num_workers=workers)
        self.per_epoch = data.training_sequences.orders[0].length / BATCH
        self.steps = int(self.per_epoch) + 4
        save = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        self.model = run(data, self.steps, enable_checkpointing=True, callbacks=[save])

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"step={step}.ckpt"


@pytest.fixture(scope="module")
def wholes(prepared_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Whole]:
    """The run read by no worker, and by two."""
    return {n: Whole(prepared_path, tmp_path_factory.mktemp("run"), n) for n in (0, 2)}


@pytest.fixture
def whole(wholes: dict[int, Whole]) -> Whole:
    return wholes[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_crosses_the_end_of_the_data(
    wholes: dict[int, Whole], prepared_path: Path, workers: int
) -> None:
    whole = wholes[workers]
    data = module(prepared_path, sequence_length=LENGTH)
    stream = data.training_sequences
    seen = torch.cat(whole.model.batches)
    assert torch.equal(seen, stream.__getitems__(range(len(seen))))
    total = stream.orders[0].length
    assert total < len(seen) < 2 * total and total % BATCH
    assert len({row.numpy().tobytes() for row in seen[:total]}) == total


@pytest.mark.parametrize(
    ("where", "saved", "workers"),
    [("first step", 0, 2), ("middle", 2, 0), ("boundary", 2, 2), ("after", 0, 0)],
)
def test_resume_is_exact(
    wholes: dict[int, Whole], prepared_path: Path, where: str, saved: int, workers: int
) -> None:
    whole = wholes[saved]
    boundary = int(whole.per_epoch)
    step = {"first step": 1, "middle": 5, "boundary": boundary, "after": boundary + 2}[where]
    data = module(prepared_path, sequence_length=LENGTH, num_workers=workers)
    resumed = run(data, whole.steps, whole.checkpoint(step))
    assert_continues(resumed, whole.model, step)


def test_a_boundary_between_two_steps(prepared_path: Path, tmp_path: Path) -> None:
    """The last batch of one pass and the first of the next are different steps."""
    path = tmp_path / "out"
    count = PreparedData(prepared_path)
    text = b"".join(count.documents("train"))[: LENGTH * 2 * BATCH + 1]
    (tmp_path / "in.txt").write_bytes(text)
    prepare(tmp_path / "in.txt", path, validation_fraction=0.0, progress=False)
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    data = module(path, sequence_length=LENGTH)
    assert data.training_sequences.orders[0].length == 2 * BATCH
    uninterrupted = run(data, 5, enable_checkpointing=True, callbacks=[save])
    for step, workers in ((2, 2), (4, 0)):
        fresh = module(path, sequence_length=LENGTH, num_workers=workers)
        assert_continues(run(fresh, 5, tmp_path / f"step={step}.ckpt"), uninterrupted, step)


def test_loaders_made_before_the_step_is_restored(whole: Whole, prepared_path: Path) -> None:
    data = module(prepared_path, sequence_length=LENGTH)
    resumed = run(data, whole.steps, whole.checkpoint(5), model=EagerBigrams)
    assert_continues(resumed, whole.model, 5)


@pytest.mark.parametrize("saved_by", ["callback", "after fit"])
def test_a_finished_run_is_made_longer(
    whole: Whole, prepared_path: Path, tmp_path: Path, saved_by: str
) -> None:
    data = module(prepared_path, sequence_length=LENGTH)
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=6)
    shorter = trainer(6, enable_checkpointing=True, callbacks=[save])
    shorter.fit(Bigrams(), datamodule=data)
    path = tmp_path / "step=6.ckpt"
    if saved_by == "after fit":
        path = tmp_path / "end.ckpt"
        shorter.save_checkpoint(path)
    resumed = run(module(prepared_path, sequence_length=LENGTH), whole.steps, path)
    assert_continues(resumed, whole.model, 6)
    epochs: Any = resumed.trainer.fit_loop.epoch_progress.current
    assert epochs.ready == epochs.processed == (1 if saved_by == "callback" else 2)


class StoppedError(Exception):
    pass


class StopBetweenSteps(L.Callback):
    """Saves in the middle of a step's batches, as a stop by signal may."""

    def __init__(self, batch: int, path: Path) -> None:
        self.batch = batch
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *rest: Any) -> None:
        if len(module.batches) == self.batch:
            trainer.save_checkpoint(self.path)
            raise StoppedError


def test_a_stop_between_two_steps_repeats_the_begun_one(
    whole: Whole, prepared_path: Path, tmp_path: Path
) -> None:
    path = tmp_path / "stopped.ckpt"
    stop = StopBetweenSteps(5 * BATCH // MICRO + 1, path)
    with pytest.raises(StoppedError):
        run(module(prepared_path, sequence_length=LENGTH), whole.steps, callbacks=[stop])
    resumed = run(module(prepared_path, sequence_length=LENGTH), whole.steps, path)
    assert_continues(resumed, whole.model, 5)


@pytest.mark.parametrize(("batch", "micro"), [(6, 2), (16, 4), (3, 3)])
def test_another_batch_size_neither_repeats_nor_skips(
    whole: Whole, prepared_path: Path, batch: int, micro: int
) -> None:
    sizes = {"batch_size": batch, "micro_batch_size": micro}
    data = module(prepared_path, sequence_length=LENGTH, **sizes)
    model = run(data, 9, whole.checkpoint(5), accumulation=batch // micro)
    seen = torch.cat(model.batches)
    first = 5 * BATCH
    assert len(seen) == 4 * batch
    assert torch.equal(seen, data.training_sequences.__getitems__(range(first, first + len(seen))))
    assert data.consumed_sequences == first + len(seen)


def test_a_second_resume_remembers_the_first_batch_size(
    whole: Whole, prepared_path: Path, tmp_path: Path
) -> None:
    data = module(prepared_path, sequence_length=LENGTH, batch_size=4)
    fit = trainer(8, accumulation=2)
    fit.fit(Bigrams(), datamodule=data, ckpt_path=whole.checkpoint(5))
    fit.save_checkpoint(tmp_path / "again.ckpt")
    again = module(prepared_path, sequence_length=LENGTH)
    model = run(again, 9, tmp_path / "again.ckpt")
    first = 5 * BATCH + 3 * 4
    expected = again.training_sequences.__getitems__(range(first, first + BATCH))
    assert torch.equal(torch.cat(model.batches), expected)


def test_training_by_epochs(prepared_path: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_epochs": 2, "enable_checkpointing": True}
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    data = module(prepared_path, sequence_length=LENGTH)
    per_epoch = data.training_sequences.orders[0].length // BATCH
    whole = run(data, -1, callbacks=[save], **options)
    seen = torch.cat(whole.batches)
    assert len(seen) == 2 * per_epoch * BATCH
    assert torch.equal(seen, data.training_sequences.__getitems__(range(len(seen))))
    for step, workers in ((3, 0), (per_epoch, 2), (per_epoch + 2, 0)):
        fresh = module(prepared_path, sequence_length=LENGTH, num_workers=workers)
        resumed = run(fresh, -1, tmp_path / f"step={step}.ckpt", max_epochs=2)
        assert_continues(resumed, whole, step)


def test_validation_does_not_disturb_training(whole: Whole, prepared_path: Path) -> None:
    data = module(prepared_path, sequence_length=LENGTH, num_workers=2, validation_sequences=6)
    options = {"limit_val_batches": 1.0, "val_check_interval": 4, "check_val_every_n_epoch": None}
    resumed = run(data, whole.steps, whole.checkpoint(5), **options)
    assert_continues(resumed, whole.model, 5)
    assert resumed.validated > 2 * 6


def test_other_data_are_refused_unless_allowed(
    whole: Whole, prepared_path: Path, other_prepared_path: Path
) -> None:
    for options, message in (
        ({"seed": 3}, "seed was 0 and is 3"),
        ({"sequence_length": 512}, "sequence_length was 1024 and is 512"),
        ({"path": other_prepared_path}, r"other data \(sources\)"),
        ({"path": [prepared_path, other_prepared_path]}, r"other data \(sources\)"),
        ({"shuffle_window": 2}, "shuffle_window was 8 and is 2"),
    ):
        chosen = {"path": prepared_path, "sequence_length": LENGTH, **options}
        with pytest.raises(UserError, match=message):
            run(module(**chosen), whole.steps, whole.checkpoint(5))
        if "seed" not in options and "path" not in options:
            continue
        allowed = module(**chosen, allow_data_change=True)
        model = run(allowed, 6, whole.checkpoint(5))
        expected = allowed.training_sequences.__getitems__(range(5 * BATCH, 6 * BATCH))
        assert torch.equal(torch.cat(model.batches), expected)


def test_validation_of_a_checkpoint_may_use_other_data(
    whole: Whole, other_prepared_path: Path
) -> None:
    data = module(other_prepared_path, sequence_length=128, validation_sequences=4)
    model = Bigrams()
    trainer(1, limit_val_batches=1.0).validate(
        model, datamodule=data, ckpt_path=whole.checkpoint(5), verbose=False
    )
    assert model.validated == 4
