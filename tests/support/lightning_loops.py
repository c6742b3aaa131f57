"""Probes of the table: what limits a fit, its data, and the loops beside it."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, LambdaCallback
from lightning_features import (
    Batches,
    fit,
    loader,
    log_likelihoods,
    losses,
    model,
    probe,
    series,
    text_data,
    text_model,
    trainer,
)
from torch.utils.data import DataLoader, TensorDataset

from mhc_lightning.errors import UserError
from mhc_lightning.held_out_steps import SequenceScores

length = partial(probe, "How long a fit is")
data = partial(probe, "Data")
held_out = partial(probe, "Validate, test, predict")


def cosine(steps: int) -> list[float]:
    """The learning rates of `model()`, written out."""
    after = [0.5 * (1 + math.cos(math.pi * k / (steps - 2))) for k in range(steps - 2)]
    return [0.005, 0.01, *(0.01 * (0.1 + 0.9 * factor) for factor in after)][:steps]


@length("`max_steps`")
def max_steps() -> None:
    assert series(fit(max_steps=5), "train/learning_rate") == pytest.approx(cosine(5))


@length("`max_epochs` without `max_steps`", note="the schedule is spread over these epochs' steps")
def max_epochs() -> None:
    run = fit(max_epochs=3, accumulate_grad_batches=4)  # 6 batches: 2 steps each
    assert series(run, "train/learning_rate") == pytest.approx(cosine(6))
    module, texts = text_model(), text_data()
    run = fit(module, texts, max_epochs=2, accumulate_grad_batches=2)
    passes = 2 * (sum(order.length for order in texts.training_sequences.orders) // 4)
    assert series(run, "train/learning_rate") == pytest.approx(cosine(passes))
    assert run.current_epoch == 2


@length("`max_epochs` and `max_steps`", note="what ends the fit first ends the schedule")
def max_epochs_and_steps() -> None:
    run = fit(max_epochs=1, max_steps=50)
    assert series(run, "train/learning_rate") == pytest.approx(cosine(6))


@length("`max_time` with `schedule=constant`")
def max_time() -> None:
    run = fit(model(schedule="constant"), max_steps=-1, max_time={"seconds": 1e-6})
    assert series(run, "train/learning_rate") == pytest.approx([0.005])  # one step


@length(
    "`max_time` alone with another schedule",
    raises=(UserError, "depends on the number of steps, which is not known"),
)
def max_time_alone() -> None:
    fit(max_steps=-1, max_time={"seconds": 60})


@length("`min_epochs`, `min_steps`")
def least() -> None:
    stop = LambdaCallback(on_train_batch_end=lambda run, *_: setattr(run, "should_stop", True))
    run = fit(max_epochs=3, min_steps=8, callbacks=[stop])
    assert run.global_step == 8


@length("`fast_dev_run`")
def fast_dev_run() -> None:
    run = fit(validation=loader(), fast_dev_run=2)
    assert run.global_step == 2 and "val/loss" in run.callback_metrics
    run = fit(text_model(), text_data(), fast_dev_run=4, accumulate_grad_batches=2)
    assert run.global_step == 2


@data("a `DataLoader` of int64 tokens")
def plain_loader() -> None:
    module, batches = model(), loader()
    with torch.no_grad():
        expected = -log_likelihoods(module, next(iter(batches))).mean() / 8
    assert losses(fit(module, batches))[0] == pytest.approx(float(expected), rel=1e-6)


@data(
    "a `TensorDataset`, whose batches are lists",
    raises=(UserError, "a batch must be a tensor of int64 tokens [B, S + 1], not list"),
)
def tensor_dataset() -> None:
    tokens = torch.zeros(4, 9, dtype=torch.int64)
    fit(data=DataLoader(TensorDataset(tokens), batch_size=2))


@data("`train_dataloader` and `val_dataloader` of a subclass")
def loaders_of_the_module() -> None:
    module: Any = model()
    module.train_dataloader = loader
    module.val_dataloader = loader
    run = trainer()
    run.fit(module)
    assert losses(run) == losses(fit(model(), loader(), loader()))


@data("`overfit_batches`", note="`TextDataModule` gives the same first batches in every epoch")
def overfit_batches() -> None:
    for module, batches in ((model(), loader()), (text_model(), text_data())):
        seen = Batches()
        options = {"accumulate_grad_batches": 2} if batches is not None else {}
        fit(module, batches, max_epochs=3, overfit_batches=2, callbacks=[seen], **options)
        assert seen.epochs == [0, 0, 1, 1, 2, 2]
        for k, batch in enumerate(seen.seen):
            assert torch.equal(batch, seen.seen[k % 2])


@data("`limit_train_batches`, `limit_val_batches`")
def limits() -> None:
    run = fit(validation=loader(), max_epochs=2, limit_train_batches=0.5, limit_val_batches=1)
    assert run.global_step == 6 and float(run.callback_metrics["val/tokens"]) == 16
    seen = Batches()
    limited = {"max_epochs": 2, "limit_train_batches": 4, "accumulate_grad_batches": 2}
    fit(text_model(), text_data(), callbacks=[seen], **limited)
    texts = text_data()
    stream = texts.training_sequences.__getitems__(range(16))
    assert torch.equal(torch.cat(seen.seen), stream)  # the second epoch goes on in the stream


@data("`reload_dataloaders_every_n_epochs`")
def reloaded() -> None:
    again = {"max_epochs": 2, "reload_dataloaders_every_n_epochs": 1}
    assert losses(fit(**again)) == losses(fit(max_epochs=2))
    both = [
        losses(fit(text_model(), text_data(), accumulate_grad_batches=2, **options))
        for options in (again, {"max_epochs": 2})
    ]
    assert both[0] == both[1]


@data("`accumulate_grad_batches` of a `DataLoader`")
def accumulation() -> None:
    halves = losses(fit(data=loader(8, 2), accumulate_grad_batches=2))
    assert halves == pytest.approx(losses(fit(data=loader(4, 4))), rel=1e-5)


@data(
    "`accumulate_grad_batches` that does not give `TextDataModule` its `batch_size`",
    raises=(UserError, "in micro-batches of 2 on 1 ranks takes 2"),
)
def wrong_accumulation() -> None:
    fit(text_model(), text_data(), accumulate_grad_batches=3)


@held_out("`val_check_interval` (a number of batches, or a part of an epoch)")
def val_check_interval() -> None:
    run = fit(validation=loader(), max_epochs=2, val_check_interval=0.5)
    assert series(run, "val/loss") == pytest.approx(
        series(fit(validation=loader(), max_epochs=2, val_check_interval=3), "val/loss"), rel=0
    )
    assert len(series(run, "val/loss")) == 4
    run = fit(text_model(), text_data(), accumulate_grad_batches=2, val_check_interval=0.25)
    assert len(series(run, "val/loss")) == 4


@held_out("`check_val_every_n_epoch`, `num_sanity_val_steps`")
def sanity() -> None:
    run = fit(validation=loader(), max_epochs=4, check_val_every_n_epoch=2, num_sanity_val_steps=-1)
    assert len(series(run, "val/loss")) == 2


def padded() -> DataLoader:
    """Six sequences of different lengths."""
    tokens = torch.cat(list(loader(3)))
    for k in range(4):
        tokens[k, 3 + k :] = -100
    return DataLoader(tokens, batch_size=4)  # type: ignore[arg-type]


@held_out("`Trainer.validate`, `Trainer.test`", note="`test/loss`, `test/perplexity`")
def tested() -> None:
    module = model()
    with torch.no_grad():
        total = torch.cat([log_likelihoods(module, batch) for batch in padded()]).sum()
    mean = -float(total) / (2 + 3 + 4 + 5 + 8 + 8)
    (found,) = trainer().test(module, padded(), verbose=False)
    assert found["test/loss"] == pytest.approx(mean, rel=1e-6)
    assert found["test/perplexity"] == pytest.approx(math.exp(mean), rel=1e-6)
    (again,) = trainer().validate(module, padded(), verbose=False)
    assert again["val/loss"] == found["test/loss"]
    held = text_data(batch_size=2)
    (found,) = trainer().test(text_model(), datamodule=held, verbose=False)
    (again,) = trainer().validate(text_model(), datamodule=held, verbose=False)
    assert again["val/loss"] == found["test/loss"]


@held_out("`Trainer.predict`", note="log-likelihood and number of tokens of each sequence")
def predicted() -> None:
    module = model()
    found: Any = trainer().predict(module, padded())
    assert [scores.num_tokens.tolist() for scores in found] == [[2, 3, 4, 5], [8, 8]]
    for scores, batch in zip(found, padded(), strict=True):
        assert scores.log_likelihood.dtype == torch.float64
        expected = log_likelihoods(module, batch)
        torch.testing.assert_close(scores.log_likelihood, expected, rtol=1e-6, atol=0)
    held = text_data(micro_batch_size=3, batch_size=3)
    module, run = text_model(), trainer()
    rows: Any = run.predict(module, datamodule=held)
    (whole,) = run.validate(module, datamodule=held, verbose=False)
    mean = -sum(s.log_likelihood.sum() for s in rows) / sum(s.num_tokens.sum() for s in rows)
    assert float(mean) == pytest.approx(whole["val/loss"], rel=1e-12)


class _Writer(BasePredictionWriter):
    def __init__(self) -> None:
        super().__init__("batch")
        self.written: list[float] = []

    def write_on_batch_end(
        self, trainer: Any, module: Any, prediction: Any, indices: Any, *rest: Any
    ) -> None:
        assert isinstance(prediction, SequenceScores)
        self.written += prediction.log_likelihood.tolist()


@held_out("`BasePredictionWriter`, `return_predictions=False`")
def written() -> None:
    module, writer = model(), _Writer()
    trainer(callbacks=[writer]).predict(module, padded(), return_predictions=False)
    expected: Any = trainer().predict(module, padded())
    assert writer.written == torch.cat([s.log_likelihood for s in expected]).tolist()


@held_out("`limit_test_batches`, `limit_predict_batches`")
def held_out_limits() -> None:
    run = trainer(limit_test_batches=1, limit_predict_batches=1)
    run.test(model(), padded(), verbose=False)
    assert float(run.callback_metrics["test/tokens"]) == 14
    scores: Any = run.predict(text_model(), datamodule=text_data())
    assert len(scores) == 1


@held_out("`inference_mode=False`")
def without_inference_mode() -> None:
    module = model()
    results = [
        trainer(inference_mode=mode).test(module, loader(), verbose=False) for mode in (True, False)
    ]
    assert results[0] == results[1]
