"""Recomputation: bit for bit equal gradients, from the tensors that the paper's Table 3 keeps."""

import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from networks import CONNECTIONS, DENSE, EXPERTS, scrambled, tiny_transformer
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from live_storages import LiveStorages
from mhc_lightning.errors import UserError
from mhc_lightning.kernels import expand_streams
from mhc_lightning.modules import Connection, ManifoldHyperConnection, Transformer
from mhc_lightning.modules.block import PreNorm
from mhc_lightning.modules.recompute import recomputing
from mhc_lightning.modules.recompute_size import best_recompute_size, resolve_recompute

TOKENS = torch.randint(0, 40, (2, 10), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", autouse=True)
def _collections_are_fast() -> Iterator[None]:
    """Exempt the objects of imported libraries: tests collect garbage before they count bytes."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def make(connection: str = "mhc", **changes: Any) -> Transformer:
    """Three blocks whose parameters all have a gradient, without experts by default."""
    model = tiny_transformer(connection, **{"num_layers": 3, **DENSE, **changes})
    return scrambled(model, 0.05)


def gradients(model: Transformer, size: int, mixed: bool = False) -> list[Tensor]:
    """Of two micro-batches, and their losses."""
    model.recompute_block_size = size
    model.zero_grad()
    losses = []
    for tokens in (TOKENS, TOKENS.flip(0, 1)):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        losses.append(loss.detach())
    return [p.grad for p in model.parameters() if p.grad is not None] + losses


def equal(ours: list[Tensor], expected: list[Tensor]) -> bool:
    return len(ours) == len(expected) and all(map(torch.equal, ours, expected))


@pytest.mark.parametrize("connection", CONNECTIONS)
def test_gradients_are_bit_for_bit_equal(connection: str) -> None:
    # One per sub-layer, within a Transformer block, all, and more than there are.
    sizes = {"32-true": (1, 3, 7), "bf16-mixed": (4,), "bf16-true": (3, 6)}
    for precision, block_sizes in sizes.items():
        # The last two of three blocks have experts.
        model = make(connection, **(DENSE if precision == "bf16-true" else EXPERTS))
        mixed = precision == "bf16-mixed"
        if precision == "bf16-true":
            model.bfloat16()
        expected = gradients(model, 0, mixed)
        for size in block_sizes:
            assert equal(gradients(model, size, mixed), expected), (precision, size)


@pytest.mark.parametrize("kernels", ["triton", "compiled"])
@pytest.mark.parametrize(
    "connection",
    [
        *("mhc", "mhc_single_pass"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("mhc_lite", "identity", "krom", "hc", "hc_static")
        ),
    ],
)
def test_by_kernels_with_fused_seams(
    connection: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MHC_LIGHTNING_KERNELS", kernels)
    model = make(connection, num_layers=2)
    results: list[list[Any]] = []
    for size in (0, 3):
        model.recompute_block_size = size
        model.zero_grad()
        model.loss(TOKENS[:1, :5], TOKENS[:1, 1:6]).backward()
        results.append([p.grad for p in model.parameters()])
    for ours in results[1:]:
        assert equal(ours, results[0])


def test_attention_and_feed_forward_run_once_and_nobody_sees_a_replay() -> None:
    model = make(**EXPERTS)
    calls: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    model.recompute_block_size = 4
    loss = model.loss(TOKENS[:, :-1], TOKENS[:, 1:])
    seen = list(calls)
    loss.backward()
    assert calls == seen
    assert sum(name.endswith("window") for name in seen) == 6
    for block in range(3):
        for part in ("attention", "feed_forward"):
            assert seen.count(f"blocks.{block}.{part}.body") == 1
            assert seen.count(f"blocks.{block}.{part}.norm") == 1


class Kept(torch.autograd.Function):
    """Halves its input and keeps nothing, or the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: bool) -> Tensor:
        if keep:
            ctx.save_for_backward(x)
        return x * 0.5

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * 0.5 + sum(0 * x for x in ctx.saved_tensors), None


def keeps_nothing(u: Tensor) -> Tensor:
    return Kept.apply(u, False)


class Norm(nn.Module):
    """A norm that keeps its input."""

    def forward(self, x: Tensor) -> Tensor:
        return Kept.apply(x, True)


@pytest.fixture
def run() -> Iterator[Callable[..., tuple[LiveStorages, Tensor]]]:
    """Returns a function: sub-layers in recompute blocks; live storages, and a loss to go back."""

    def run(
        layers: list[Connection], sublayer: Callable[[Tensor], Tensor], size: int, tokens: int
    ) -> tuple[LiveStorages, Tensor]:
        n, width = layers[0].num_streams, layers[0].dim
        parameters = [p for layer in layers for p in layer.parameters()]
        start = torch.randn(tokens, width, requires_grad=True)
        live = LiveStorages([*parameters, start])
        with live:
            # Not as copies of one tensor: that is what the first stage alone starts with.
            flow: Any = expand_streams(start, n) * 1
            with recomputing(size):
                for layer in layers:
                    flow = layer.run(flow, sublayer)
                streams, carry = flow.merge()
            del flow
            # A learned read-out keeps the streams, whatever it is.
            loss = streams.square().sum() if carry is not None else streams.sum()
            del streams, carry
        gc.collect()
        return live, loss

    yield run


@pytest.mark.parametrize(
    ("connection", "n", "layers", "size"),
    [
        ("mhc", 4, 8, 4),
        ("mhc", 4, 4, 1),
        ("mhc_single_pass", 2, 7, 3),
        ("mhc_single_pass", 3, 5, 9),
    ],
)
def test_bytes_kept_between_forward_and_backward(
    connection: str, n: int, layers: int, size: int, run: Callable[..., Any]
) -> None:
    width, tokens = 64, 50
    stack = [CONNECTIONS[connection](width, n, index) for index in range(layers)]
    learned = connection == "mhc_single_pass"
    before, _other = run(stack, keeps_nothing, 0, tokens)
    off = before.bytes()
    live, loss = run(stack, keeps_nothing, size, tokens)
    kept = live.bytes() - loss.nbytes
    entries = n * width * -(-layers // size)
    elements = entries + width * layers + (n * width if learned else 0)
    allowed = (4 * 1.02 * elements + (2 * n * n + 4 * n + 1) * 4 * layers) * tokens
    assert kept <= allowed
    # Off keeps the streams of every sub-layer (its u is kept by nobody here), and so are these.
    assert off - live.bytes() == 4 * tokens * n * width * (layers - -(-layers // size))
    loss.backward()
    del loss
    gc.collect()
    assert live.bytes() == 0


def test_bytes_at_the_peak_of_a_replay(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a norm and a body that keep their inputs: streams, aggregates and normed inputs."""
    from mhc_lightning.modules import replay as rebuilding

    n, width, layers, size, tokens = 4, 64, 8, 4, 50
    stack = [ManifoldHyperConnection(width, n, index) for index in range(layers)]
    sublayer = PreNorm(width, 1e-20, nn.Identity())
    sublayer.norm, sublayer.body = Norm(), Norm()  # type: ignore[assignment]
    live, loss = run(stack, sublayer, size, tokens)
    kept, grown = live.bytes(), []
    replay = rebuilding.replay_streams

    def measured(*args: Any) -> Any:
        live.peak, before = 0, live.bytes()
        result = replay(*args)
        grown.append(live.peak - before)
        return result

    monkeypatch.setattr(rebuilding, "replay_streams", measured)
    with live:
        loss.backward()
    vector = 4 * width * tokens
    assert len(grown) == layers // size
    # A norm's output is rebuilt when its sub-layer is reached: it is not among these.
    assert max(grown) == ((size - 1) * n + size) * vector
    assert max(grown) + size * vector <= (n + 2) * size * vector
    off, _other = run(stack, sublayer, 0, tokens)
    assert off.bytes() - kept == (layers * (n + 2) - layers // size * n) * vector


def test_a_sub_layer_without_parts_keeps_what_it_makes_of_its_input(run: Callable) -> None:
    """Its input is rebuilt; anything else that it keeps is its own."""
    n, width, layers, tokens = 2, 32, 6, 20
    stack = [ManifoldHyperConnection(width, n, index) for index in range(layers)]
    runs = [
        run(stack, sublayer, 3, tokens)
        for sublayer in (
            keeps_nothing,
            lambda u: Kept.apply(u, True),
            lambda u: Kept.apply(2 * u, True),
        )
    ]
    nothing, its_input, doubled = (live.bytes() for live, _ in runs)
    assert its_input == nothing
    assert doubled - nothing == 4 * layers * width * tokens
    for _live, loss in runs:
        torch.autograd.grad(loss, [p for layer in stack for p in layer.parameters()])


def test_a_graph_that_is_dropped_is_gone() -> None:
    model, left = make(), []
    for size in (0, 4):
        model.recompute_block_size = size
        with LiveStorages(model.parameters()) as live:
            loss = model.loss(TOKENS[:, :-1], TOKENS[:, 1:])
            kept = live.bytes()
            del loss
            left.append(live.bytes())  # cosines and sines, or the like
    assert left[0] == left[1] < kept / 100


def test_what_a_connection_does_not_replay_is_kept(run: Callable[..., Any]) -> None:
    class Other(ManifoldHyperConnection):
        def write(self, *args: Any) -> tuple[Tensor, None]:
            return 2 * super().write(*args)[0], None

    def stack(*others: int) -> list[Connection]:
        return [
            (Other if index in others else ManifoldHyperConnection)(32, 2, index)
            for index in range(6)
        ]

    runs = [run(stack(*others), keeps_nothing, 3, 20) for others in ((), (1,), (0, 5))]
    parts = [live.bytes() for live, _ in runs]
    # Blocks {0,1,2} {3,4,5}, then {0} 1 {2,3,4} {5}, then 0 {1,2,3} {4} 5.
    for _live, loss in runs:
        loss.backward()
    assert [(part - parts[0]) // (4 * 20 * 2 * 32) for part in parts] == [0, 2, 2]


def test_what_is_changed_in_place_is_not_rebuilt_as_it_was(run: Callable[..., Any]) -> None:
    stack = [ManifoldHyperConnection(16, 2, index) for index in range(4)]
    parameters = [p for layer in stack for p in layer.parameters()]
    outputs: list[Tensor] = []

    def changes_its_input(u: Tensor) -> Tensor:
        return u.mul_(2).pow(2)

    def shows_its_output(u: Tensor) -> Tensor:
        outputs.append(2 * u)
        return outputs[-1]

    results = []
    for size in (0, 3):
        torch.manual_seed(0)
        _, loss = run(stack, changes_its_input, size, 5)
        results.append(torch.autograd.grad(loss, parameters))
    assert equal(list(results[1]), list(results[0]))
    for size in (0, 3):
        _, loss = run(stack, shows_its_output, size, 5)
        outputs[-1].detach().zero_()
        with pytest.raises(RuntimeError, match=r"in place|inplace"):
            loss.backward()


def test_what_hooks_change_is_not_rebuilt_without_them() -> None:
    def doubled(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return 2 * output

    def halved(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0] / 2 + 1,)

    def mixed(module: nn.Module, args: tuple, mappings: Any) -> Any:
        return type(mappings)(*(2 * mapping for mapping in mappings))

    for connection in ("mhc", "hc", "hc_static", "mhc_single_pass"):
        model = make(connection)
        block = model.blocks[1]
        block.attention.norm.register_forward_hook(doubled)
        block.feed_forward.norm.register_forward_pre_hook(halved)
        block.attention_connection.window.register_forward_hook(mixed)
        assert equal(gradients(model, 4), gradients(model, 0))


class Dropped(nn.Module):
    """A norm with an adapter that is random."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.dropout = base, nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.dropout(x)


def test_a_norm_that_is_not_as_it_was_is_not_run_again() -> None:
    def squared(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output * output.tanh()

    def doubled(_module: nn.Module, grads: Any, _out: Any) -> tuple[Tensor]:
        return (2 * grads[0],)

    def random(norm: nn.Module) -> nn.Module:
        return Dropped(norm)

    def hooked(norm: nn.Module) -> nn.Module:
        norm.register_forward_hook(squared)
        return norm

    def hooked_backward(norm: nn.Module) -> nn.Module:
        norm.register_full_backward_hook(doubled)
        return norm

    def parametrized(norm: nn.Module) -> nn.Module:
        return parametrize.register_parametrization(norm, "weight", nn.Tanh())

    for change in (random, hooked, hooked_backward, parametrized):
        model = make(**EXPERTS)
        for block in model.blocks:
            for part in (block.attention, block.feed_forward):
                part.register_module("norm", change(part.get_submodule("norm")))
        results = []
        for size in (0, 4):
            torch.manual_seed(3)
            results.append(gradients(model, size))
        assert equal(*results), change.__name__


def test_compiled_sub_layers() -> None:
    """Compiled in their first forward pass, under recomputation, and the same without it."""
    model = make(num_layers=1)
    eager = gradients(model, 0)
    model.compile_sublayers()
    ours = gradients(model, 2)
    assert equal(gradients(model, 0), ours)
    for compiled, value in zip(ours, eager, strict=True):
        assert torch.allclose(compiled, value, rtol=1e-3, atol=1e-5)


def test_ordinary_checkpointing_of_sub_layers_composes() -> None:
    """Attention and feed-forward then run twice, and keep their input's handle alone."""
    plain, model = make(**EXPERTS), make(**EXPERTS)
    for block in model.blocks:
        for name in ("attention", "feed_forward"):
            part = block.get_submodule(name)
            part.forward = partial(checkpoint, part.forward, use_reentrant=False)
    expected = gradients(plain, 0)
    assert equal(gradients(model, 4), expected)
    parts = []
    for network, size in ((model, 0), (plain, 4), (model, 4)):
        network.recompute_block_size = size
        with LiveStorages(network.parameters()) as live:
            loss = network.loss(TOKENS[:, :-1], TOKENS[:, 1:])
            gc.collect()
            parts.append(live.bytes())
            del loss
    assert parts[2] < min(parts[:2])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("connection", ["mhc", "mhc_single_pass", "hc", "residual"])
def test_checkpointing_of_blocks(connection: str, reentrant: bool) -> None:
    """By hand, by torch's wrapper and in place of `forward`, of all blocks or of some."""
    kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    expected = gradients(make(connection, **EXPERTS), 0)
    for chosen, size in (((0, 1, 2), 4), ((1,), 0), ((0, 2), 4)):
        model = make(connection, **EXPERTS)
        for index in chosen:
            wrapped = checkpoint_wrapper(model.blocks[index], checkpoint_impl=kind)
            model.blocks[index] = wrapped
        assert equal(gradients(model, size), expected), (chosen, size)
    for chosen, size in (((0, 1, 2), 0), ((1,), 4)):
        model = make(connection, **EXPERTS)
        for index in chosen:
            block = model.blocks[index]
            block.forward = partial(checkpoint, block.forward, use_reentrant=reentrant)
        assert equal(gradients(model, size), expected), (chosen, size)
    model = make(connection, **EXPERTS)

    def by_hand(streams: Tensor, carry: Tensor | None = None) -> Any:
        flow: Any = streams, carry
        for block in model.blocks:
            flow = checkpoint(block, *flow, use_reentrant=reentrant)
        return flow

    model.run_blocks = by_hand  # type: ignore[method-assign, assignment]
    assert equal(gradients(model, 0), expected)


def test_within_checkpointing_of_everything() -> None:
    plain, model = make(), make()
    model.run_blocks = partial(checkpoint, model.run_blocks, use_reentrant=False)  # type: ignore[method-assign]
    assert equal(gradients(model, 4), gradients(plain, 0))


def test_other_saved_tensor_hooks_get_what_is_kept() -> None:
    """Autograd asks the innermost hooks alone; those around recomputation are asked by it."""
    model, packed = make(), []
    expected = gradients(model, 0)

    def pack(tensor: Tensor) -> int:
        packed.append(tensor.detach())
        return len(packed) - 1

    counts = []
    for size in (0, 4):
        packed.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda number: packed[number]):
            assert equal(gradients(model, size), expected)
        counts.append(len(packed))
    assert 0 < counts[1] < counts[0]


def test_a_retained_graph_is_rebuilt_again() -> None:
    model = make()
    model.recompute_block_size = 4
    loss = model.loss(TOKENS[:, :-1], TOKENS[:, 1:])
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    assert equal(list(torch.autograd.grad(loss, list(model.parameters()))), list(first))


def test_without_gradients_nothing_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    from mhc_lightning.modules import recompute

    monkeypatch.setattr(recompute, "_Recording", None)
    model = make()
    model.recompute_block_size = 4
    with torch.no_grad():
        model.loss(TOKENS[:, :-1], TOKENS[:, 1:])


def test_frozen_parameters() -> None:
    model = make()
    for frozen in (model.embedding, *model.blocks[:1], model.blocks[2].attention.norm):
        frozen.requires_grad_(False)
    assert equal(gradients(model, 4), gradients(model, 0))


def test_a_failed_forward_pass_leaves_nothing_behind() -> None:
    model = make()
    expected = gradients(model, 0)
    handle = model.blocks[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gradients(model, 4)
    handle.remove()
    assert equal(gradients(model, 4), expected)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_size_of_a_block() -> None:
    assert resolve_recompute("off", 24, 4) == resolve_recompute(False, 24, 4) == 0
    assert resolve_recompute(None, 24, 4) == 0
    assert resolve_recompute(7, 24, 4) == 7
    assert resolve_recompute("auto", 24, 4) == best_recompute_size(24, 4) == 4
    # Stages of two sub-layers: blocks of two, although four would be best without stages.
    assert resolve_recompute("auto", [2] * 12, 4) == 2
    for wrong in ("banana", 0, -1, True, 2.0):
        with pytest.raises(UserError, match=f"recompute={wrong}"):
            resolve_recompute(wrong, 24, 4)  # type: ignore[arg-type]


def test_a_network_is_told_of_its_stages() -> None:
    model = make(num_layers=6)
    assert model.set_recompute("auto") == model.recompute_block_size == 3
    assert model.set_recompute("auto", [2, 2, 2]) == model.recompute_block_size == 2
    assert model.set_recompute("off", [2, 2, 2]) == model.recompute_block_size == 0
    assert make("residual").set_recompute("auto") == 0


def test_the_best_block_under_stage_boundaries() -> None:
    for stages in ([6, 6], [2, 6, 4], [10, 2], [5, 7, 9, 3]):
        for n in (1, 2, 4, 8):
            cost = {
                size: n * sum(-(-stage // size) for stage in stages) + (n + 2) * size
                for size in range(1, sum(stages) + 1)
            }
            best = min(cost.values())
            assert best_recompute_size(stages, n) == min(s for s in cost if cost[s] == best)
