"""The instrument of memories, against what the parts of a network say when they are asked."""

import json
import os
import subprocess
import sys
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
import watched_memory_in_processes
from networks import scrambled, tiny_transformer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mhc_lightning import LanguageModel
from mhc_lightning.callbacks import MemoryReading, MemoryUse
from mhc_lightning.errors import UserError
from mhc_lightning.language_model import inputs_and_targets
from mhc_lightning.modules import Engram, OverEncoding
from mhc_lightning.modules.block import PreNorm
from mhc_lightning.optimizers.recipes import AdamWRecipe

LENGTH, BATCH = 12, 4
ENGRAM = partial(Engram, rows=50, dim=8, num_heads=2, layers=[0, 1], zero_start=False)
OVER_ENCODING = partial(OverEncoding, rows=67, dim=8, num_heads=2)


def model_with(memory: Any = None, **options: Any) -> LanguageModel:
    network = tiny_transformer(**({"memory": memory} if memory else {}))
    return LanguageModel(
        scrambled(network, seed=1), AdamWRecipe(lr=1e-12, schedule="constant"), **options
    )


@pytest.fixture
def tokens() -> DataLoader:
    """Tokens of which small ones are frequent."""
    generator = torch.Generator().manual_seed(3)
    drawn: Any = (torch.rand(64, LENGTH + 1, generator=generator) ** 3 * 40).long()
    return DataLoader(drawn, batch_size=BATCH)


@torch.no_grad()
def expected_of_engram(model: LanguageModel, batch: Tensor) -> dict[str, float]:
    """The numbers of one micro-batch, with the network run block by block."""
    network, (inputs, _) = model.model, inputs_and_targets(batch)
    recalled = network.recall(inputs)
    streams, carry = network.embed(inputs), None
    values: dict[str, float] = {}
    collisions: dict[int, list[int]] = {2: [0, 0], 3: [0, 0]}
    touched, shares = 0, []
    for k, block in enumerate(network.blocks):
        memory: Any = block.memory
        rows = memory.table(recalled[k]).flatten(-2)
        key = memory.key(rows).unflatten(-1, (4, 16))
        score = (norm(streams, memory.gate.stream_norm) * norm(key, memory.gate.key_norm)).sum(-1)
        score = score / 16**0.5
        gate = torch.sigmoid(score.sign() * score.abs().clamp(min=1e-6).sqrt())
        added = memory(streams, recalled) - streams
        values[f"memory/gate/layer_{k}"] = gate.mean().item()
        for m in range(4):
            values[f"memory/gate/layer_{k}/stream_{m}"] = gate[..., m].mean().item()
        values[f"memory/added_norm/layer_{k}"] = (added.norm() / streams.norm()).item()
        of_table, shared, ngrams = count(inputs, recalled[k], collisions)
        values[f"memory/rows_touched/layer_{k}"] = of_table
        values[f"memory/collisions/layer_{k}"] = shared / ngrams
        touched += of_table
        shares.append((shared, ngrams))
        streams, carry = block(streams, carry, recalled=recalled)
    values["memory/rows_touched"] = touched
    values["memory/collisions"] = sum(s for s, _ in shares) / sum(n for _, n in shares)
    for order, (shared, ngrams) in collisions.items():
        values[f"memory/collisions/order_{order}"] = shared / ngrams
    return values


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True)).rsqrt() * weight.view(4, 16)


def count(inputs: Tensor, rows: Tensor, by_order: dict[int, list[int]]) -> tuple[int, int, int]:
    """Rows touched, colliding n-grams and n-grams of a table, by dictionaries."""
    padded = torch.cat([torch.zeros(len(inputs), 2, dtype=torch.long), inputs], 1)
    touched = shared = ngrams = 0
    for head, order in enumerate((2, 2, 3, 3)):
        found: dict[int, set[Any]] = {}
        for b in range(len(inputs)):
            for t in range(inputs.shape[1]):
                ngram = tuple(padded[b, t + 3 - order : t + 3].tolist())
                found.setdefault(int(rows[b, t, head]), set()).add(ngram)
        sizes = [len(s) for s in found.values()]
        here = sum(size for size in sizes if size > 1), sum(sizes)
        touched, shared, ngrams = touched + len(sizes), shared + here[0], ngrams + here[1]
        by_order[order] = [a + b for a, b in zip(by_order[order], here, strict=True)]
    return touched, shared, ngrams


@pytest.mark.parametrize("options", [{}, {"recompute": 2}, {"compile": True}])
def test_numbers_of_engram(
    fit: Any, tokens: DataLoader, events: Any, monkeypatch: pytest.MonkeyPatch, options: Any
) -> None:
    model, use = model_with(ENGRAM, **options), MemoryUse()
    if options.get("compile"):
        monkeypatch.setattr(PreNorm, "compile", partialmethod(nn.Module.compile, backend="eager"))
    fit(model, use, data=tokens, max_steps=2, accumulate_grad_batches=2)
    batch = list(tokens)[2]  # the first micro-batch of the second step
    wanted = expected_of_engram(model, batch)
    assert use.last.pop("step") == 2
    assert use.last == pytest.approx(wanted, rel=1e-4)
    assert 0 < wanted["memory/collisions"] < 1
    scalars = events().Tags()["scalars"]
    assert set(wanted) <= set(scalars)
    assert not any(m._forward_hooks for m in model.modules())


def test_hooks_exist_in_the_first_micro_batch_of_logged_steps_only(
    fit: Any, tokens: DataLoader
) -> None:
    hooked: list[tuple[int, int, int]] = []

    class Counting(LanguageModel):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            hooked.append((self.global_step, batch_idx, self.hooks()))
            return loss

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            assert self.hooks() == 0

        def hooks(self) -> int:
            return sum(len(m._forward_hooks) for m in self.modules())

        def on_validation_epoch_end(self) -> None:
            return None

    model = Counting(tiny_transformer(memory=ENGRAM), AdamWRecipe(lr=1e-3, schedule="constant"))
    fit(model, MemoryUse(2), data=tokens, max_steps=4, accumulate_grad_batches=2)
    assert [(step, n) for step, _, n in hooked if n] == [(1, 5), (3, 5)]  # hash, parts, windows
    assert len(hooked) == 8


def test_numbers_of_over_encoding(fit: Any, tokens: DataLoader) -> None:
    model, use = model_with(OVER_ENCODING), MemoryUse(1)
    fit(model, use, data=tokens, max_steps=1)
    inputs, _ = inputs_and_targets(next(iter(tokens)))
    with torch.no_grad():
        words = model.model.embedding(inputs)
        recalled = model.model.recall(inputs)
        memory: Any = model.model.input_memory
        rows = memory.table(recalled[-1]).flatten(-2)
        added = (rows @ memory.projection.weight.T / 5).norm() / words.norm()
    touched, shared, ngrams = count(inputs, recalled[-1], {2: [0, 0], 3: [0, 0]})
    assert use.last["memory/added_norm/input"] == pytest.approx(added.item(), rel=1e-4)
    assert use.last["memory/rows_touched"] == use.last["memory/rows_touched/input"] == touched
    assert use.last["memory/collisions"] == pytest.approx(shared / ngrams)
    assert not any("gate" in tag for tag in use.last)


def test_without_a_memory_nothing_is_said(fit: Any, tokens: DataLoader, recwarn: Any) -> None:
    model, use = model_with(), MemoryUse(1)
    fit(model, use, data=tokens, max_steps=2)
    assert use.last == {}
    assert not [w for w in recwarn if "MemoryUse" in str(w.message)]


def test_a_start_at_zero_adds_nothing(fit: Any, tokens: DataLoader) -> None:
    network = tiny_transformer(memory=partial(ENGRAM, zero_start=True))
    model, use = LanguageModel(network, AdamWRecipe(lr=1e-3, schedule="constant")), MemoryUse(1)
    fit(model, use, data=tokens, max_steps=1)
    assert use.last["memory/added_norm/layer_0"] == 0
    assert 0.3 < use.last["memory/gate/layer_0"] < 0.7


def test_a_model_compiled_as_a_whole(fit: Any, tokens: DataLoader) -> None:
    """Programs with and without hooks, and no further ones; numbers as in eager code."""
    programs: list[int] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        programs.append(1)
        return graph.forward

    def train(compile_it: bool, *watched: Any) -> None:
        model = model_with(ENGRAM)
        if compile_it:
            embed: Any = torch.compile(model.model.embed, backend=backend)
            model.model.embed = embed
            for block in model.model.blocks:
                block.compile(backend=backend)
        fit(model, *watched, data=tokens, max_steps=4)

    torch.compiler.reset()
    eager, compiled = MemoryUse(2), MemoryUse(2)
    train(False, eager)
    train(True)
    unwatched = len(programs)
    train(True, compiled)
    watched = len(programs) - unwatched
    assert compiled.last == pytest.approx(eager.last, rel=1e-4)
    assert unwatched < watched <= 2 * unwatched
    assert torch._dynamo.config.skip_nnmodule_hook_guards
    torch.compiler.reset()


class OwnMemory(nn.Module):
    """Somebody else's: one table of 2-grams at the input, opened by a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(14, 4)
        self.gate = nn.Linear(4, 1)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before = tokens.roll(1, -1)
        suffixes = torch.stack([tokens, before], -1)
        rows = ((tokens * 3 + before) % 14)[..., None]
        gate = torch.sigmoid(self.gate(x))
        return x + gate * self.table(rows[..., 0]), rows, torch.cat([suffixes, gate], -1)


def test_another_project(foreign: Any, fit: Any) -> None:
    class Model(foreign.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = OwnMemory()

        def forward(self, x: Tensor) -> Tensor:
            self.read = x, self.memory(x, (x[..., 0] * 10).long())
            return super().forward(self.read[1][0])

    def extract(module: nn.Module, args: tuple[Any, ...], output: Any) -> MemoryReading | None:
        if not isinstance(module, OwnMemory):
            return None
        result, rows, rest = output
        suffixes, gate = rest[..., :2].long(), rest[..., 2:]
        return MemoryReading("input", gate, rows, suffixes, (2,), args[0], result)

    model, use = Model(), MemoryUse(2, extract)
    fit(model, use, max_steps=2)
    before, (after, rows, rest) = model.read
    assert use.last["memory/gate/input"] == pytest.approx(rest[..., 2].mean().item(), rel=1e-5)
    norms = ((after - before).norm() / before.norm()).item()
    assert use.last["memory/added_norm/input"] == pytest.approx(norms, rel=1e-5)
    assert use.last["memory/rows_touched"] == len(rows.unique())


def test_readings_that_are_none_are_refused(foreign: Any, fit: Any) -> None:
    rows = torch.zeros(3, 2, dtype=torch.int64)
    wrong: list[tuple[Any, str]] = [
        (torch.ones(3), "extract returned a Tensor for a Mixer; return a MemoryReading"),
        (MemoryReading("input", rows=rows), r"suffixes of shape None and orders \[\]"),
        (MemoryReading("input", rows=rows, suffixes=rows, orders=(2,)), r"orders \[2\]"),
        (MemoryReading("input", rows=rows, suffixes=rows, orders=(2, 3)), r"orders \[2, 3\]"),
        (MemoryReading("input", rows=rows, suffixes=rows[1:], orders=(2, 2)), r"\(3, 2\), suff"),
    ]
    for reading, message in wrong:
        use = MemoryUse(1, lambda m, *_, r=reading: r if type(m).__name__ == "Mixer" else None)
        with pytest.raises(UserError, match=message):
            fit(foreign.Module(), use, max_steps=1, logger=False)


def test_processes_and_stages(tmp_path: Path) -> None:
    """Each rank samples its own micro-batch; the stages of a pipeline, one of all blocks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    names = ("ddp", "fsdp", "pipeline")
    done = subprocess.run(
        [sys.executable, *launcher, watched_memory_in_processes.__file__, str(tmp_path), *names],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    halves = [watched_memory_in_processes.train(name) for name in ("first_half", "second_half")]
    assert halves[0] != halves[1] and len(halves[0]) == 21
    for name in names:
        for rank, half in enumerate(halves):
            seen = json.loads((tmp_path / f"{name}_{rank}.json").read_text())
            assert seen == pytest.approx(halves[0] if name == "pipeline" else half, rel=1e-5)
