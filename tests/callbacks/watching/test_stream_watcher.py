"""The watcher: which records it collects, and that it leaves no hook."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mhc_lightning.callbacks.watching.stream_watcher import StreamWatcher
from mhc_lightning.errors import UserError
from mhc_lightning.kernels import StreamMappings


class Source(nn.Module):
    """Yields one record per call, numbered."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> StreamMappings:
        ones = torch.ones(x.shape[0], 2)
        return StreamMappings(ones, ones, self.number * torch.eye(2).expand(x.shape[0], 2, 2))


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


def watch(module: nn.Module, call: Any, **options: Any) -> list[Any]:
    watcher = StreamWatcher(**options)
    watcher.open(module)
    call(module)
    seen = watcher.close()
    assert not any(m._forward_hooks or m._forward_hooks_with_kwargs for m in module.modules())
    return seen


def numbers(seen: list[Any]) -> list[float]:
    return [o.mappings.residual[0, 0, 0].item() for o in seen]


X = torch.ones(3, 4)


def test_lists_sub_layers_in_the_order_of_the_calls() -> None:
    module = nn.ModuleDict({"b": Source(1), "a": Source(2), "c": Source(3)})
    seen = watch(module, lambda m: [m[k](X) for k in "cab"])
    assert [o.name for o in seen] == ["c", "a", "b"]
    assert numbers(seen) == [3, 2, 1]


def test_a_record_that_is_handed_on_counts_once() -> None:
    seen = watch(Wrapper(Wrapper(Source(1))), lambda m: m(X))
    assert [o.name for o in seen] == ["inner.inner"]


def test_a_module_called_twice_counts_twice_even_with_one_record() -> None:
    class Constant(nn.Module):
        record = Source(1)(X)

        def forward(self, x: Tensor) -> StreamMappings:
            return self.record

    seen = watch(nn.Sequential(Constant()), lambda m: [m[0](X), m[0](X)])
    assert [o.name for o in seen] == ["0", "0"]


def test_extract_reads_foreign_modules_with_their_keyword_arguments() -> None:
    class Foreign(nn.Module):
        def forward(self, x: Tensor, *, scale: float) -> Tensor:
            return scale * torch.eye(2).expand(3, 2, 2)

    def extract(module: nn.Module, args: tuple[Any, ...], output: Any) -> StreamMappings | None:
        if not isinstance(module, Foreign):
            return None
        assert args[1:] == (5.0,)
        return StreamMappings(output[..., 0], output[..., 0], output)

    module = nn.ModuleList([Foreign(), Source(1)])
    seen = watch(module, lambda m: (m[0](X, scale=5.0), m[1](X)), extract=extract)
    assert numbers(seen) == [5.0]


def test_forward_passes_replayed_in_backward_are_left_out() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.source = Source(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.source(x).residual.sum() * x * x

    module = nn.ModuleList([Block(), Block()])
    calls = []
    module[0].source.register_forward_hook(lambda *_: calls.append(1))
    x = X.clone().requires_grad_()
    watcher = StreamWatcher()
    watcher.open(module)
    y = x
    for block in module:
        y = checkpoint(block, y, use_reentrant=False)
    y.sum().backward()
    assert len(calls) == 2  # once forward, once replayed
    assert [o.name for o in watcher.close()] == ["0.source", "1.source"]


def test_notes_are_taken_without_gradients_and_records_come_detached() -> None:
    weight = torch.tensor(2.0, requires_grad=True)

    class Learned(nn.Module):
        def forward(self, x: Tensor) -> StreamMappings:
            residual = weight * torch.eye(2).expand(3, 2, 2)
            return StreamMappings(residual[..., 0], residual[..., 0], residual)

    def note(module: nn.Module, args: Any, output: Any, mappings: StreamMappings) -> Tensor:
        return mappings.residual.sum() + args[0].sum()

    (seen,) = watch(nn.Sequential(Learned()), lambda m: m(X), note=note)
    assert seen.note.item() == 12 + 12
    assert not seen.note.requires_grad
    assert not any(t.requires_grad for t in seen.mappings)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda *_: (1, 2, 3), "returned a tuple"),
        (lambda *_: StreamMappings(X, X, torch.ones(3, 2, 4)), r"\(3, 2, 4\)"),
        (lambda *_: StreamMappings(X, X, torch.ones(3)), r"\(3,\)"),
    ],
)
def test_an_extract_that_returns_no_record_is_a_user_error(wrong: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        watch(nn.Sequential(Source(1)), lambda m: m(X), extract=wrong)


def test_nothing_is_seen_outside_the_window() -> None:
    module = nn.Sequential(Source(1))
    watcher = StreamWatcher()
    module(X)
    assert watcher.close() == []
    watcher.open(module)
    watcher.close()
    module(X)
    assert watcher.close() == []


def test_watching_leaves_the_head_fused_with_the_loss(tiny_transformer, monkeypatch) -> None:
    """All logits at once would be the largest tensor of a step, on sampled steps alone."""
    network = tiny_transformer()
    tokens, targets = torch.randint(0, 40, (2, 2, 9))
    unwatched = network.loss(tokens, targets)
    called: list[int] = []
    monkeypatch.setattr(
        torch.nn.Linear, "forward", lambda self, x: called.append(id(self)) or x @ self.weight.t()
    )
    watcher = StreamWatcher()
    watcher.open(network)
    watched = network.loss(tokens, targets)
    assert len(watcher.close()) == 4
    assert called and id(network.output) not in called
    assert torch.equal(watched, unwatched)
