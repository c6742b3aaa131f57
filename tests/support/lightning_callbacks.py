"""Probes of the table: Lightning's callbacks and its tuner."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    Callback,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelPruning,
    ModelSummary,
    RichModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.model_summary import summarize
from lightning_features import (
    Batches,
    Recorder,
    assert_same,
    fit,
    loader,
    losses,
    model,
    probe,
    series,
    text_data,
    text_model,
    trainer,
    weights,
)
from lightning_loops import cosine
from torch import Tensor, nn

from mhc_lightning import LanguageModel
from mhc_lightning.errors import UserError
from mhc_lightning.optimizers.recipes import AdamWRecipe

tuner = partial(probe, "Tuner")
callback = partial(probe, "Callbacks")


@tuner("`Tuner.lr_find`", note="it sets `model.lr`, the peak of the schedule")
def lr_find() -> None:
    module, run = model(), trainer(max_steps=4)
    before = weights(module)
    found: Any = Tuner(run).lr_find(module, loader(40), num_training=20, max_lr=0.5)
    assert module.lr == module.optimizer.lr == found.suggestion() != 1e-2
    assert_same(weights(module), before)
    run.fit(module, loader())
    expected = [rate / 1e-2 * module.lr for rate in cosine(4)]
    assert series(run, "train/learning_rate") == pytest.approx(expected)
    assert losses(run)[0] == losses(fit())[0]


@tuner("`Tuner.lr_find` with `TextDataModule`", note="the fit begins with the first batch")
def lr_find_in_text() -> None:
    module, texts, seen = text_model(), text_data(), Batches()
    run = trainer(accumulate_grad_batches=2, max_epochs=1, limit_train_batches=4, callbacks=[seen])
    Tuner(run).lr_find(module, datamodule=texts, num_training=10)
    seen.seen.clear()
    run.fit(module, datamodule=texts)
    assert torch.equal(torch.cat(seen.seen), texts.training_sequences.__getitems__(range(8)))


@tuner("`LearningRateFinder`", note="the fit goes on with the rate that it finds")
def lr_finder() -> None:
    module = model()
    finder = LearningRateFinder(num_training_steps=20, max_lr=0.5)
    run = fit(module, loader(40), max_steps=6, callbacks=[finder], enable_progress_bar=True)
    assert module.lr == finder.optimal_lr.suggestion() != 1e-2  # type: ignore[union-attr]
    expected = [rate / 1e-2 * module.lr for rate in cosine(6)]
    assert series(run, "train/learning_rate") == pytest.approx(expected)


class Hungry(LanguageModel):
    """Runs out of memory with more than eight sequences."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if len(batch) > 8:
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(batch, batch_idx)


@tuner(
    "`Tuner.scale_batch_size`",
    note="it scales `batch_size` of a `TextDataModule` with `micro_batch_size=None`",
)
def scale_batch_size() -> None:
    texts, seen = text_data(micro_batch_size=None), Batches()
    module = Hungry(text_model().model, AdamWRecipe(lr=1e-2))
    run = trainer(max_steps=4, callbacks=[seen])
    assert Tuner(run).scale_batch_size(module, datamodule=texts) == 8
    assert texts.batch_size == texts.micro_batch_size == 8
    run.fit(module, datamodule=texts)
    assert torch.equal(torch.cat(seen.seen), texts.training_sequences.__getitems__(range(32)))


@tuner(
    "`Tuner.scale_batch_size` with a fixed `micro_batch_size`",
    raises=(UserError, "data.batch_size=4 in micro-batches of 1 on 1 ranks takes 4"),
    note="more accumulation needs no more memory",
)
def scale_batch_size_of_micro_batches() -> None:
    texts = text_data(micro_batch_size=1, batch_size=1)
    Tuner(trainer()).scale_batch_size(text_model(), datamodule=texts)


@callback("`EarlyStopping`")
def early_stopping() -> None:
    stop = EarlyStopping("val/loss", patience=1, min_delta=100)
    run = fit(validation=loader(), max_epochs=9, callbacks=[stop])
    assert run.current_epoch == 2  # the second is not better by 100


class Trajectory(Callback):
    """Keeps the parameters at a hook."""

    def __init__(self, hook: str) -> None:
        self.kept: list[dict[str, Tensor]] = []
        setattr(self, hook, self._keep)

    def _keep(self, trainer: Any, module: nn.Module, *rest: Any) -> None:
        self.kept.append({name: p.detach().clone() for name, p in module.named_parameters()})


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters()}


@callback("`StochasticWeightAveraging`", note="with `max_epochs`")
def swa() -> None:
    module, kept = model(), Trajectory("on_train_epoch_start")
    averaging = StochasticWeightAveraging(1e-3, swa_epoch_start=2, annealing_epochs=1)
    fit(module, max_epochs=4, callbacks=[kept, averaging])
    last = kept.kept[1:]  # from the second epoch on
    mean = {name: sum(p[name] for p in last) / len(last) for name in last[0]}
    assert_same(parameters(module), mean, atol=1e-6)  # type: ignore[arg-type]


@callback("`EMAWeightAveraging`", note="a memory of n-grams needs `use_buffers=False`")
def ema() -> None:
    module, kept = model(), Trajectory("on_train_batch_end")
    averaging = EMAWeightAveraging(decay=0.9)
    validation = loader(seed=2)
    run = fit(module, None, validation, max_epochs=1, callbacks=[kept, averaging])
    expected = kept.kept[0]
    for later in kept.kept[1:]:
        expected = {k: 0.9 * p + 0.1 * later[k] for k, p in expected.items()}
    assert_same(parameters(module), expected, atol=1e-6)
    (again,) = trainer().validate(module, validation, verbose=False)  # the average was validated
    assert series(run, "val/loss")[-1] == pytest.approx(again["val/loss"], rel=1e-5)


@callback("`GradientAccumulationScheduler`", note="with a loader of your own")
def accumulation_scheduler() -> None:
    run = fit(max_epochs=3, callbacks=[GradientAccumulationScheduler({1: 3})])
    assert run.global_step == 6 + 2 + 2
    assert series(run, "train/learning_rate") == pytest.approx(cosine(10))


@callback(
    "`GradientAccumulationScheduler` with `TextDataModule`",
    raises=(UserError, "TextDataModule takes data.batch_size sequences for every step"),
)
def accumulation_scheduler_in_text() -> None:
    scheduler = GradientAccumulationScheduler({1: 2})
    fit(text_model(), text_data(micro_batch_size=4), max_epochs=2, callbacks=[scheduler])


@callback("`LearningRateMonitor`, `DeviceStatsMonitor`, `ThroughputMonitor`")
def monitors() -> None:
    monitors = [
        LearningRateMonitor("step"),
        DeviceStatsMonitor(cpu_stats=True),
        ThroughputMonitor(batch_size_fn=len, length_fn=lambda batch: batch.shape[1], window_size=2),
    ]
    run = fit(callbacks=monitors)
    assert series(run, "lr-AdamW/pg1") == pytest.approx(cosine(4))
    assert any("cpu_percent" in name for row in _rows(run) for name in row)
    assert series(run, "train/samples")[-1] == 8


def _rows(run: Any) -> list[dict[str, float]]:
    assert isinstance(run.logger, Recorder)
    return run.logger.rows


@callback("`Timer`")
def timer() -> None:
    watch = Timer(duration={"hours": 1})
    fit(callbacks=[watch])
    assert 0 < watch.time_elapsed("train") < 3600


@callback("`ModelSummary`, `RichModelSummary`")
def summaries() -> None:
    module = model()
    fit(module, callbacks=[RichModelSummary(max_depth=2)], enable_model_summary=True)
    fit(model(), callbacks=[ModelSummary(max_depth=2)], enable_model_summary=True)
    summary = summarize(module, max_depth=2)
    assert summary.total_parameters == sum(p.numel() for p in module.parameters())
    assert "model.blocks" in str(summary)


@callback("`TQDMProgressBar`, `RichProgressBar`")
def progress_bars() -> None:
    for bar in (TQDMProgressBar(), RichProgressBar()):
        options = {"max_epochs": 1, "enable_progress_bar": True}
        run = fit(validation=loader(), callbacks=[bar], **options)
        assert {"train/loss", "val/loss"} <= set(run.progress_bar_metrics)


class Thaw(BaseFinetuning):
    """Trains the first block from the second epoch on."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.model.blocks[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.model.blocks[0], optimizer, lr=1e-3)


@callback("`BaseFinetuning`", note="the added group keeps its learning rate")
def finetuning() -> None:
    module, kept = model(), Trajectory("on_train_epoch_end")
    start = parameters(model())
    run = fit(module, max_epochs=2, callbacks=[Thaw(), kept])
    for name, value in start.items():
        frozen = name.startswith("model.blocks.0.")
        assert torch.equal(kept.kept[0][name], value) == frozen, name
    assert not any(torch.equal(parameters(module)[name], value) for name, value in start.items())
    assert run.optimizers[0].param_groups[-1]["lr"] == 1e-3
    assert series(run, "train/learning_rate") == pytest.approx(cosine(12))


class WithBackbone(LanguageModel):
    @property
    def backbone(self) -> nn.Module:
        return self.model.blocks


@callback("`BackboneFinetuning`", note="a subclass names its `backbone`")
def backbone() -> None:
    module = WithBackbone(model().model, AdamWRecipe(lr=1e-2))
    start = parameters(model())
    thaw, kept = BackboneFinetuning(unfreeze_backbone_at_epoch=1), Trajectory("on_train_epoch_end")
    fit(module, max_epochs=2, callbacks=[thaw, kept])
    same = {n: torch.equal(kept.kept[0][n], p) for n, p in start.items()}
    assert all(same[n] == n.startswith("model.blocks.") for n in start)
    assert not torch.equal(
        parameters(module)["model.blocks.0.attention.norm.weight"], torch.ones(16)
    )


def prune(choose: Callable[[nn.Module], Any]) -> nn.Module:
    module = model()
    pruning = ModelPruning("l1_unstructured", parameters_to_prune=choose(module), amount=0.5)
    fit(module, max_epochs=1, callbacks=[pruning])
    return module


@callback("`ModelPruning` of every `nn.Linear`")
def pruned() -> None:
    def linears(module: nn.Module) -> list[Any]:
        return [m for m in module.modules() if isinstance(m, nn.Linear)]

    module = prune(lambda module: [(m, "weight") for m in linears(module)])
    zeros = sum(int((m.weight == 0).sum()) for m in linears(module))
    assert zeros == round(0.5 * sum(m.weight.numel() for m in linears(module)))


@callback(
    "`ModelPruning` of all weights and biases",
    raises=(UserError, "would prune the biases of connections"),
)
def pruned_everywhere() -> None:
    prune(lambda module: None)


class Notes(Callback):
    """What went wrong."""

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        self.seen = exception


@callback("`on_exception`")
def on_exception() -> None:
    notes, module = Notes(), model()
    module.log = None  # type: ignore[assignment]
    with pytest.raises(TypeError):
        fit(module, callbacks=[notes])
    assert isinstance(notes.seen, TypeError)
