"""Probes of the table: precision, checkpoints, profilers, Fabric, and processes."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from lightning_features import (
    assert_same,
    fit,
    loader,
    losses,
    model,
    network,
    probe,
    series,
    text_data,
    text_model,
    trainer,
    weights,
)

from mhc_lightning.errors import UserError
from mhc_lightning.held_out_steps import inputs_and_targets

precision = partial(probe, "Precision and gradients")
checkpoint = partial(probe, "Checkpoints")
checks = partial(probe, "Profilers and checks")
processes = partial(probe, "Processes")


@precision('`precision="bf16-mixed"`', note="connections stay float32")
def bf16_mixed() -> None:
    module = model()
    run = fit(module, precision="bf16-mixed")
    assert losses(run) == pytest.approx(losses(fit()), rel=0.02)
    assert {p.dtype for p in module.parameters()} == {torch.float32}


@precision('`precision="bf16-true"`', note="connections stay float32; a warning says what is lost")
def bf16_true() -> None:
    module = model()
    with pytest.warns(UserWarning, match="an update below 1/512 of a value is lost"):
        run = fit(module, precision="bf16-true")
    assert losses(run) == pytest.approx(losses(fit()), rel=0.05)
    assert {str(p.dtype) for p in module.parameters()} == {"torch.float32", "torch.bfloat16"}


@precision('`precision="64-true"`')
def double() -> None:
    module = model()
    run = fit(module, precision="64-true")
    assert losses(run) == pytest.approx(losses(fit()), rel=1e-5)
    assert {p.dtype for p in module.parameters()} == {torch.float64}


@precision('`precision="16-true"`', raises=(UserError, "AdamW would divide by zero"))
def half() -> None:
    fit(precision="16-true")


@precision(
    '`precision="16-mixed"` on a GPU',
    raises=(UserError, "is not supported (gradients would be clipped at their scaled size)"),
)
def half_mixed() -> None:
    scaler = torch.amp.GradScaler("cpu")
    fit(plugins=[MixedPrecision("16-mixed", "cpu", scaler)])


class Gradients(Callback):
    """Keeps the norm and the largest value of the gradients that each step used."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.largest: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
        gradients = [p.grad for p in module.parameters()]
        self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        self.largest.append(max(float(g.abs().max()) for g in gradients))


@precision("`gradient_clip_val`, by norm and by value")
def clipping() -> None:
    seen = Gradients()
    fit(gradient_clip_val=0.01, callbacks=[seen])
    assert seen.norms == pytest.approx([0.01] * 4, rel=1e-4)
    seen = Gradients()
    fit(gradient_clip_val=0.01, gradient_clip_algorithm="value", callbacks=[seen])
    assert seen.largest == pytest.approx([0.01] * 4, rel=1e-6)
    assert min(seen.norms) > 0.02


@precision("`detect_anomaly`, `deterministic`, `benchmark`")
def anomaly() -> None:
    try:
        run = fit(detect_anomaly=True, deterministic=True, benchmark=False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses(run) == losses(fit())


def resumed(module: Any, data: Any, path: Path, **options: Any) -> list[float]:
    run = trainer(**options)
    batches = {"datamodule": data} if hasattr(data, "tokenizer") else {"train_dataloaders": data}
    run.fit(module, ckpt_path=path, weights_only=False, **batches)
    return losses(run)


@checkpoint("`ModelCheckpoint` and `Trainer.fit(ckpt_path=…)`", note="losses are bit-identical")
def plain_checkpoint() -> None:
    cases: list[tuple[Any, Any, dict[str, Any]]] = [
        (model, loader, {"max_epochs": 3}),
        (text_model, text_data, {"max_epochs": 2, "accumulate_grad_batches": 2}),
        (text_model, text_data, {"max_steps": 12, "accumulate_grad_batches": 2}),
    ]
    for k, (build, make_data, options) in enumerate(cases):
        whole = losses(fit(build(), make_data(), **options))
        keep = ModelCheckpoint(f"kept{k}", filename="{step}", every_n_train_steps=6, save_top_k=-1)
        saving = {"callbacks": [keep], "enable_checkpointing": True}
        fit(build(), make_data(), **options, **saving)
        found = resumed(build(), make_data(), Path(f"kept{k}/step=6.ckpt"), **options)
        assert found == whole[6:], options


@checkpoint('`ModelCheckpoint(monitor="val/loss")`, `ckpt_path="best"`')
def best() -> None:
    module, keep = model(), ModelCheckpoint("best", monitor="val/loss")
    saving = {"callbacks": [keep], "enable_checkpointing": True}
    run = fit(module, None, loader(seed=2), max_epochs=4, **saving)
    (found,) = run.test(module, loader(seed=2), ckpt_path="best", weights_only=False, verbose=False)
    assert found["test/loss"] == pytest.approx(min(series(run, "val/loss")), rel=1e-12)


@checkpoint("`OnExceptionCheckpoint`")
def on_exception_checkpoint() -> None:
    class Broken(type(model())):  # type: ignore[misc]
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_start(batch, batch_idx)
            if self.trainer.global_step == 2:
                raise ValueError("the plug was pulled")

    options: dict[str, Any] = {"accumulate_grad_batches": 2}
    whole = losses(fit(text_model(), text_data(), **options))
    module = Broken(text_model().model, text_model().optimizer)
    saving = {"callbacks": [OnExceptionCheckpoint("fallen")], "enable_checkpointing": True}
    with pytest.raises(ValueError, match="the plug"):
        fit(module, text_data(), **options, **saving)
    (path,) = Path("fallen").glob("*.ckpt")
    assert resumed(text_model(), text_data(), path, **options) == whole[2:]


@checkpoint("`Trainer.save_checkpoint(weights_only=True)`")
def save_checkpoint() -> None:
    module = model()
    fit(module).save_checkpoint("weights.ckpt", weights_only=True)
    saved = torch.load("weights.ckpt", weights_only=True)
    assert "optimizer_states" not in saved
    other = model()
    other.load_state_dict(saved["state_dict"])
    assert_same(weights(other), weights(module))


@checks("`profiler` (`simple`, `advanced`, `pytorch`)")
def profilers() -> None:
    for kind in (SimpleProfiler, AdvancedProfiler, PyTorchProfiler):
        fit(max_steps=2, profiler=kind(dirpath=kind.__name__, filename="table"))
        written = Path(kind.__name__, "fit-table.txt").read_text()
        assert "SingleDeviceStrategy.backward" in written


@checks("`barebones`")
def barebones() -> None:
    kept = {"logger": None, "log_every_n_steps": None, "enable_progress_bar": None}
    module = model()
    fit(
        module, barebones=True, enable_model_summary=None, enable_checkpointing=None,
        num_sanity_val_steps=None, **kept,
    )  # fmt: skip
    other = model()
    fit(other)
    assert_same(weights(module), weights(other))


@checks("`torch.compile(model)`, given to the trainer", note="`compile=True` compiles sub-layers")
def compiled() -> None:
    torch._dynamo.reset()
    module: Any = torch.compile(model(), backend="eager")
    run = fit(module, validation=loader(), max_steps=2)
    assert losses(run) == pytest.approx(losses(fit(max_steps=2)), rel=1e-6)


@checks("Fabric", note='with the `Transformer`: `mark_forward_method("loss")`')
def fabric() -> None:
    expected = model()
    run = fit(expected)
    fabric = L.Fabric(accelerator="cpu", devices=1)
    inner, recipe = network(), model().optimizer
    optimizer, scheduler = recipe.build(inner, total_steps=4)
    net, optimizer = fabric.setup(inner, optimizer)
    net.mark_forward_method("loss")
    found = []
    for _, batch in zip(range(4), fabric.setup_dataloaders(loader()), strict=False):
        loss = net.loss(*inputs_and_targets(batch))
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        found.append(float(loss))
    assert found == losses(run)
    assert_same(weights(inner), weights(expected.model))


def launched(strategy: str) -> None:
    """Two processes that Lightning launches out of this one; then the model, back in this one."""
    script = Path(__file__).with_name("launched_by_lightning.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, str(script), strategy],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    alone = text_model()
    fit(alone, text_data(), accumulate_grad_batches=2)
    (expected,) = trainer().test(alone, datamodule=text_data(), verbose=False)
    assert found["test/loss"] == pytest.approx(expected["test/loss"], rel=1e-5)


@processes('`strategy="ddp_notebook"`, `"ddp_fork"`', slow=True)
def notebook() -> None:
    launched("ddp_notebook")


@processes('`strategy="ddp_spawn"`', slow=True)
def spawned() -> None:
    launched("ddp_spawn")
