"""How often a training step makes the host wait for the device: once, for loss and gradient norm.

Counted on a CPU, by the operations that hand a tensor's values, or a shape that depends on them, to
Python. On a GPU each of them waits until the device has come so far.
"""

from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from mhc_lightning import LanguageModel
from mhc_lightning.callbacks import AmaxGain, ProgressBar, StabilityAlarm, StreamDiversity
from mhc_lightning.callbacks.watching.stream_watcher import StreamWatcher
from mhc_lightning.modules import (
    Engram,
    HyperConnection,
    ManifoldHyperConnection,
    OverEncoding,
    ResidualConnection,
    SinglePassHyperConnection,
    Transformer,
)
from mhc_lightning.optimizers.recipes import AdamWRecipe, MuonRecipe
from mhc_lightning.optimizers.row_updates import RowState, update_rows

_ATEN = torch.ops.aten
WAITING = {
    _ATEN._local_scalar_dense.default,
    _ATEN.equal.default,
    _ATEN.masked_select.default,
    _ATEN.nonzero.default,
    _ATEN._unique2.default,
    _ATEN.unique_consecutive.default,
    _ATEN.unique_dim.default,
}


class Operations(TorchDispatchMode):
    """Notes operators after which the host has values, or shapes that depend on them."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITING:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """Notes functions that do the same without an operator where tensors are on the CPU."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.cpu, Tensor.numpy):
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Counter(pl.Callback):
    """Notes what the third step waits for, from its first micro-batch to the next step's."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.modes: tuple[Any, ...] = ()

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 2 and not self.modes:
            self.modes = (Operations(self.seen), Functions(self.seen))
            for mode in self.modes:
                mode.__enter__()
        if trainer.global_step == 3 and self.modes:
            for mode in reversed(self.modes):
                mode.__exit__(None, None, None)
            self.modes = ()


def waits_of_a_step(
    folder: Any, network: dict[str, Any], optimizer: Any, *callbacks: pl.Callback, **trainer: Any
) -> list[str]:
    experts = {"num_experts": 4, "num_active_experts": 2, "num_shared_experts": 1}
    model = Transformer(
        **{"connection": ManifoldHyperConnection, "vocab_size": 40, "dim": 32, "num_layers": 3,
           "num_heads": 2, "ffn_dim": 48, "head_dim": 8, "rope_dim": 4, "kv_rank": 16,
           **experts, **network}
    )  # fmt: skip
    counter = Counter()
    pl.Trainer(
        accelerator="cpu",
        max_steps=4,
        gradient_clip_val=1.0,
        log_every_n_steps=50,
        logger=pl.loggers.CSVLogger(folder),
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[counter, *(callbacks or [ProgressBar()])],
        **trainer,
    ).fit(
        LanguageModel(model, optimizer),
        DataLoader(torch.randint(0, 40, (80, 17)), batch_size=4),  # type: ignore[arg-type]
    )
    return counter.seen


@pytest.mark.parametrize(
    ("network", "optimizer", "trainer"),
    [
        ({"connection": ResidualConnection, "num_experts": 0}, AdamWRecipe, {}),
        ({}, AdamWRecipe, {}),
        ({"connection": HyperConnection}, AdamWRecipe, {}),
        ({"connection": SinglePassHyperConnection}, AdamWRecipe, {}),
        ({}, AdamWRecipe, {"accumulate_grad_batches": 3}),
        ({}, AdamWRecipe, {"precision": "bf16-mixed"}),
        ({}, MuonRecipe, {}),
    ],
    ids=["residual", "mhc", "hc", "single_pass", "accumulated", "bf16-mixed", "muon"],
)
def test_a_step_waits_once(tmp_path: Any, network: Any, optimizer: Any, trainer: Any) -> None:
    seen = waits_of_a_step(tmp_path, network, optimizer(lr=1e-3), **trainer)
    assert seen == ["tolist"]


def test_instruments_do_not_wait_between_their_samples(tmp_path: Any) -> None:
    watching = (AmaxGain(10), StreamDiversity(10), ProgressBar())
    assert waits_of_a_step(tmp_path, {}, AdamWRecipe(lr=1e-3), *watching) == ["tolist"]


@pytest.mark.parametrize("instrument", [AmaxGain, StreamDiversity])
def test_a_sample_waits_once_more(tmp_path: Any, instrument: Any) -> None:
    seen = waits_of_a_step(tmp_path, {}, AdamWRecipe(lr=1e-3), instrument(1), ProgressBar())
    assert seen.count("tolist") == 2
    # Each of the six connections reads the watcher's count of calls, which is on the host.
    assert seen.count("aten._local_scalar_dense.default") == len(seen) - 2 == 6


def test_calls_are_counted_on_the_host_whatever_the_default_device() -> None:
    with torch.device("meta"):
        assert StreamWatcher()._clock.device.type == "cpu"


def test_an_alarm_waits_once_more(tmp_path: Any) -> None:
    watching = (StabilityAlarm(), ProgressBar())
    seen = waits_of_a_step(tmp_path, {}, AdamWRecipe(lr=1e-3), *watching)
    assert seen == 2 * ["tolist"]


@pytest.mark.parametrize(
    ("memory", "tables"),
    [
        (partial(Engram, rows=31, num_heads=2, dim=8), 2),
        (partial(OverEncoding, rows=57, num_heads=2, dim=8), 1),
    ],
    ids=["engram", "over_encoding"],
)
def test_rows_of_a_memory_wait_three_times_a_table(tmp_path: Any, memory: Any, tables: int) -> None:
    """Which rows a step has looked up, which of them moved, and which are new, sizes the rest."""
    seen = waits_of_a_step(tmp_path, {"memory": memory}, AdamWRecipe(lr=1e-3))
    unique, moved, new = "_unique2", "nonzero", "nonzero"
    expected = ["tolist", *tables * [f"aten.{name}.default" for name in (unique, moved, new)]]
    assert sorted(seen) == sorted(expected)


def test_rows_that_did_not_move_make_no_update_wait_longer() -> None:
    weight = torch.ones(8, 4)
    seen: list[str] = []
    rows, values = torch.tensor([[1, 2, 5]]), torch.ones(3, 4)
    values[1] = 0
    gradient = torch.sparse_coo_tensor(rows, values, (8, 4), is_coalesced=True)
    group: dict[str, Any] = {"rows": "adam", "lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
    with Operations(seen):
        update_rows(weight, gradient, RowState(weight, "adam"), group)
    assert (weight != 1).any(1).nonzero()[:, 0].tolist() == [1, 5]
    assert seen == 2 * ["aten.nonzero.default"]


def test_the_count_sees_what_waits(tmp_path: Any) -> None:
    class Waits(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            weight = module.model.embedding.weight
            assert weight.norm().item() and bool(weight.isfinite().all())
            weight.nonzero().cpu()

    seen = waits_of_a_step(tmp_path, {}, AdamWRecipe(lr=1e-3), Waits(), ProgressBar())
    host = 2 * ["aten._local_scalar_dense.default"]
    assert seen == [*host, "aten.nonzero.default", "cpu", "tolist"]


def test_bars_of_lightning_get_the_loss_and_wait_for_it(tmp_path: Any) -> None:
    class Shown(TQDMProgressBar):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step > 1:
                assert trainer.progress_bar_metrics["train/loss"] > 0

    seen = waits_of_a_step(tmp_path, {}, AdamWRecipe(lr=1e-3), Shown())
    assert seen[0] == "tolist" and set(seen[1:]) == {"aten._local_scalar_dense.default"}
