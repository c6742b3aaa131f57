"""Chains follow the streams: whatever runs in one step, products are taken within one pass."""

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from networks import MEMORIES, scrambled
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mhc_lightning.callbacks.gains import amax_gains
from mhc_lightning.callbacks.watching.observations import predecessors
from mhc_lightning.callbacks.watching.stream_watcher import StreamWatcher
from mhc_lightning.kernels import StreamMappings, merge_observers
from mhc_lightning.modules import (
    HyperConnection,
    ManifoldHyperConnection,
    PermutationHyperConnection,
    ResidualConnection,
    SinglePassHyperConnection,
    Transformer,
)

KINDS = {
    "residual": ResidualConnection,
    "hc": HyperConnection,
    "hc_static": partial(HyperConnection, dynamic=False),
    "mhc": ManifoldHyperConnection,
    "mhc_single_pass": SinglePassHyperConnection,
    "mhc_lite": PermutationHyperConnection,
}
TOKENS = torch.arange(6).view(2, 3)
ONE, TWO = [None, 0, 1, 2], [None, 0, 1, 2, None, 4, 5, 6]


def network(kind: str = "mhc", seed: int = 0, **changes: Any) -> Transformer:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "connection": KINDS[kind], "vocab_size": 8, "dim": 8, "num_layers": 2, "num_streams": 2,
        "num_heads": 1, "head_dim": 4, "rope_dim": 2, "kv_rank": 4, "ffn_dim": 8,
    }  # fmt: skip
    return Transformer(**{**settings, **changes})


def watched(root: nn.Module, call: Callable[[], Any], **options: Any) -> list[Any]:
    watcher = StreamWatcher(**options)
    watcher.open(root)
    try:
        kept = call()
    finally:
        seen = watcher.close()
    del kept
    assert not merge_observers
    return seen


def after(root: nn.Module, call: Callable[[], Any], **options: Any) -> list[int | None]:
    return predecessors(watched(root, call, **options))


def run(net: Transformer, mode: str, tokens: Tensor = TOKENS) -> Tensor:
    if mode == "no_grad":
        with torch.no_grad():
            return net(tokens)
    if mode in ("reentrant", "not reentrant"):
        recalled = net.recall(tokens)
        streams = net.embed(tokens, recalled)
        carry = None
        for block in net.blocks:
            more = (None, True, recalled) if recalled else ()
            streams, carry = checkpoint(
                block, streams, carry, *more, use_reentrant=mode == "reentrant"
            )
        return net.head(streams, carry)
    net.set_recompute("auto" if mode == "recompute" else "off")
    net.requires_grad_(mode != "frozen")
    return net.loss(tokens, tokens) if mode == "loss" else net(tokens)


MODES = ["plain", "loss", "no_grad", "frozen", "recompute", "reentrant", "not reentrant"]


# All modes of two kinds; every other kind in three modes, every mode with three others.
PAIRS = [
    (kind, mode)
    for k, kind in enumerate(KINDS)
    for m, mode in enumerate(MODES)
    if kind in ("mhc", "hc_static") or (k + 2 * m) % 7 in (0, 1, 3)
]


@pytest.mark.parametrize(("kind", "mode"), PAIRS)
def test_each_pass_of_a_network_is_one_chain(kind: str, mode: str) -> None:
    net = network(kind)
    assert after(net, lambda: run(net, mode)) == ONE
    assert after(net, lambda: (run(net, mode), run(net, mode))) == TWO
    assert after(net, lambda: (run(net, mode), run(net, mode, TOKENS.flip(0)))) == TWO


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["residual", "mhc", "mhc_single_pass"])
def test_a_memory_between_two_sub_layers_breaks_no_chain(kind: str, mode: str) -> None:
    for memory in (MEMORIES["over_encoding"], partial(MEMORIES["engram"], layers=[0, 1])):
        net = network(kind, memory=memory)
        assert after(net, partial(run, net, mode)) == ONE
        assert after(net, partial(twice, net, mode)) == TWO


@pytest.mark.parametrize("mode", ["plain", "loss", "no_grad"])
def test_composite_gains_across_a_memory_are_those_of_the_product(mode: str) -> None:
    net = scrambled(network("hc", memory=MEMORIES["engram"]), 0.3, seed=4)
    assert [block.memory is not None for block in net.blocks] == [True, True]
    seen = watched(net, lambda: run(net, mode))
    matrices = [each.mappings.residual.detach().double() for each in seen]
    product = torch.eye(2, dtype=torch.float64)
    composites = []
    for matrix in matrices:  # by hand: of each token, H_l ··· H_1
        product = matrix @ product
        composites.append(product.sum(-1).abs().amax(-1).mean())
    gains = amax_gains([each.mappings.residual for each in seen], predecessors(seen))
    torch.testing.assert_close(gains[2].double(), torch.stack(composites), rtol=1e-5, atol=0)
    assert max(composites) > 1.2 and composites[1] != composites[3]


@pytest.mark.parametrize("teacher_mode", ["no_grad", "frozen", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_teachers_and_students_are_apart_in_any_order(kind: str, teacher_mode: str) -> None:
    student, first, second = (network(kind, seed=seed) for seed in range(3))
    nets = nn.ModuleList([student, first, second])

    def step() -> Any:
        return run(first, teacher_mode), run(second, teacher_mode), run(student, "plain")

    assert after(nets, step) == [*TWO, None, 8, 9, 10]
    assert after(nets, lambda: (run(student, "plain"), run(first, teacher_mode))) == TWO


def twice(net: Transformer, mode: str) -> tuple[Tensor, Tensor]:
    return run(net, mode), run(net, mode)


def test_single_passes_by_fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MHC_LIGHTNING_KERNELS", "triton")
    for kind, mode in (("mhc", "plain"), ("mhc", "recompute"), ("mhc_single_pass", "no_grad")):
        net = network(kind, num_layers=1)
        assert after(net, partial(twice, net, mode)) == [None, 0, None, 2]


def test_gains_are_those_of_each_network_alone() -> None:
    nets = nn.ModuleList([network("hc"), network("hc", seed=1)])
    with torch.no_grad():
        for parameter in nets.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))

    def gains(*passes: int) -> Tensor:
        seen = watched(nets, lambda: [nets[k](TOKENS) for k in passes])
        return amax_gains([o.mappings.residual for o in seen], predecessors(seen))

    alone = [gains(0), gains(1)]
    for together in ((0, 1), (1, 0, 1), (0, 0)):
        assert torch.equal(gains(*together), torch.cat([alone[k] for k in together], dim=1))


def interleaved(first: Transformer, second: Transformer) -> Any:
    """Two networks, block by block, each reading something of the other besides its own streams."""
    streams = [first.embed(TOKENS), second.embed(TOKENS)]
    for blocks in zip(first.blocks, second.blocks, strict=True):
        whole = [streams[k] + streams[1 - k].mean(-2, keepdim=True) for k in (0, 1)]
        streams = [block(w)[0] for block, w in zip(blocks, whole, strict=True)]
    return streams


@pytest.mark.parametrize("kind", ["hc", "mhc"])
def test_networks_that_take_turns(kind: str) -> None:
    nets = nn.ModuleList([network(kind), network(kind, seed=1)])
    found = after(nets, lambda: interleaved(*nets))
    assert found == [None, 0, None, 2, 1, 4, 3, 6]


@pytest.mark.parametrize("kind", ["hc", "mhc"])
def test_generator_and_critic_are_apart_though_one_reads_the_other(kind: str) -> None:
    nets = nn.ModuleList([network(kind), network(kind, seed=1)])
    generator, critic = nets

    def step() -> Any:
        written = generator(TOKENS).softmax(-1)
        streams = (written @ critic.embedding.weight).unsqueeze(-2).expand(-1, -1, 2, -1)
        return critic.head(*critic.run_blocks(streams))

    assert after(nets, step) == TWO


@pytest.mark.parametrize("expand", [
    lambda x: x.unsqueeze(-2).expand(-1, -1, 2, -1),
    lambda x: x.unsqueeze(-2).repeat(1, 1, 2, 1),
    lambda x: torch.stack([x, x], dim=-2),
    lambda x: x.repeat_interleave(2, dim=-1).unflatten(-1, (2, 8)),
    lambda x: x.unsqueeze(-2) + nn.Parameter(torch.zeros(2, 8)),
    lambda x: nn.Linear(8, 16)(x).unflatten(-1, (2, 8)),
])  # fmt: skip
def test_streams_that_are_expanded_anew_begin_a_chain(expand: Any) -> None:
    net = network()

    def step() -> Any:
        streams, _ = net.run_blocks(net.embed(TOKENS))
        return net.run_blocks(expand(streams.mean(-2)))

    assert after(net, step) == TWO


@pytest.mark.parametrize("mode", ["plain", "no_grad"])
def test_weights_that_are_shared_within_a_pass_are_in_one_chain(mode: str) -> None:
    net = network()

    def loop() -> Any:
        with torch.set_grad_enabled(mode == "plain"):
            streams = net.embed(TOKENS)
            for _ in range(3):
                streams, _ = net.blocks[0](streams)
            return streams

    assert after(net, loop) == [None, 0, 1, 2, 3, 4]


MOVES = {
    "view": lambda s: s.view(-1, 2, 8).view(s.shape),
    "detached": lambda s: s.detach(),
    "precision": lambda s: s.double().float(),
    "clone": lambda s: s.clone(),
    "slice": lambda s: s[:, :2],
    "tokens": lambda s: s[torch.tensor([1, 0])],
    "norm": lambda s: nn.functional.rms_norm(s, (8,)),
    "dropout": lambda s: nn.functional.dropout(s, 0.5),
}


@pytest.mark.parametrize("move", MOVES)
def test_a_view_or_a_copy_goes_on(move: str) -> None:
    net = network()

    def step() -> Any:
        streams, _ = net.blocks[0](net.embed(TOKENS))
        return net.blocks[1](MOVES[move](streams))

    assert after(net, step) == ONE


def test_branches_of_one_trunk_and_streams_that_are_read_twice() -> None:
    net = network(num_layers=3)

    def step() -> Any:
        streams = net.embed(TOKENS)
        trunk, _ = net.blocks[0](streams)
        return net.blocks[1](trunk), net.blocks[2](trunk), net.blocks[0](streams)

    assert after(net, step) == [None, 0, 1, 2, 1, 4, None, 6]
    with torch.no_grad():
        assert after(net, step) == [None, 0, 1, 2, 1, 4, None, 6]


def test_read_and_write_by_hand_with_streams_in_memory_that_is_used_again() -> None:
    connections = nn.ModuleList(ManifoldHyperConnection(8, 2, k) for k in range(3))

    def passes() -> None:
        for _ in range(20):  # the allocator hands the same addresses out again
            streams = torch.randn(2, 3, 2, 8)
            for connection in connections:
                read, state = connection.read(streams)
                streams, _ = connection.write(streams, read.tanh(), state)
            del streams, read, state

    expected = [None if k % 3 == 0 else k - 1 for k in range(60)]
    assert after(connections, passes) == expected
    with torch.no_grad():
        assert after(connections, passes) == expected


def test_no_streams_are_kept_alive() -> None:
    net = network()
    alive: list[weakref.ref] = []
    for module in net.modules():
        if type(module).__name__ == "MappingsWindow":
            module.register_forward_hook(lambda _m, args, _o: alive.append(weakref.ref(args[0])))
    watcher = StreamWatcher()
    watcher.open(net)
    loss = net(TOKENS).sum()
    del loss
    gc.collect()
    assert len(alive) == 4
    assert not [1 for reference in alive if reference() is not None]
    assert predecessors(watcher.close()) == ONE


def test_marks_of_one_step_mean_nothing_in_the_next() -> None:
    net = network()
    kept = []

    def first() -> None:
        kept.append(net.run_blocks(net.embed(TOKENS))[0])

    watcher = StreamWatcher()
    for call in (first, lambda: net.run_blocks(kept[0])):
        watcher.open(net)
        call()
        assert predecessors(watcher.close()) == ONE


def test_passes_within_autocast_and_with_shared_embeddings() -> None:
    net = network()
    twin = copy.deepcopy(net)
    twin.embedding = net.embedding
    nets = nn.ModuleList([net, twin])
    with torch.autocast("cpu", torch.bfloat16):
        assert after(nets, lambda: (net(TOKENS), twin(TOKENS), net(TOKENS))) == [
            *TWO, None, 8, 9, 10,
        ]  # fmt: skip


# ---- models that know nothing of this package but the record


def two_views(module: Any, x: Tensor) -> Any:
    return module(x), module(2 * x)


@pytest.mark.parametrize("layers", [1, 3])
def test_foreign_views(foreign: Any, layers: int) -> None:
    module, x = foreign.Module(layers=layers), torch.randn(2, 5, 4)
    chain = [None, *range(layers - 1)]
    second = [None, *range(layers, 2 * layers - 1)]
    for grad in (True, False):
        for recompute in (False, True):
            module.recompute = recompute
            with torch.set_grad_enabled(grad):
                assert after(module, lambda: module(x)) == chain
                assert after(module, lambda: two_views(module, x)) == chain + second


def test_foreign_teacher(foreign: Any) -> None:
    nets = nn.ModuleList([foreign.Module(), foreign.Module()])
    student, teacher = nets
    x = torch.randn(2, 5, 4)

    def step() -> Any:
        with torch.no_grad():
            target = teacher(x)
        return student(x), target

    two = [None, 0, 1, None, 3, 4]
    assert after(nets, step) == two
    assert after(nets, lambda: (student(x), teacher(x))) == two  # with gradients
    teacher.requires_grad_(False)
    assert after(nets, lambda: (student(x), teacher(x))) == two


class Reader(nn.Module):
    """Hands out the branch's input and a function that merges: no module sees merged streams."""

    def __init__(self, dim: int, static: bool, detach: bool = False) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.eye(2) + 0.1 * torch.randn(2, 2))
        self.gate = nn.Linear(dim, 1)
        self.static, self.detach = static, detach

    def forward(self, streams: Tensor) -> Any:
        gate = self.gate(streams.detach() if self.detach else streams).mean((-1, -2))
        mixing = self.mixing.expand(*streams.shape[:-2], 2, 2)
        if not self.static:
            mixing = mixing * gate[..., None, None]

        def merge(output: Tensor) -> Tensor:
            rows = [
                sum(mixing[..., i, j, None] * streams[..., j, :] for j in range(2)) + output
                for i in range(2)
            ]
            return torch.stack(rows, dim=-2)

        return streams.mean(-2), merge, mixing


def extract(module: nn.Module, args: Any, output: Any) -> StreamMappings | None:
    if not isinstance(module, Reader):
        return None
    ones = torch.ones(*output[2].shape[:-1])
    return StreamMappings(ones, ones, output[2])


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("options", [(True, False), (False, False), (False, True)])
def test_foreign_merges_that_are_functions(options: Any, grad: bool) -> None:
    readers = nn.ModuleList(Reader(4, *options) for _ in range(3))
    body = nn.Linear(4, 4)

    def once(x: Tensor) -> Tensor:
        streams = torch.stack([x, x], dim=-2)
        for reader in readers:
            read, merge, _ = reader(streams)
            streams = merge(body(read))
        return streams

    x = torch.randn(2, 5, 4)
    with torch.set_grad_enabled(grad):
        assert after(readers, lambda: once(x), extract=extract) == [None, 0, 1]
        seen = after(readers, lambda: (once(x), once(2 * x)), extract=extract)
    assert seen == [None, 0, 1, None, 3, 4]


def test_mappings_that_are_made_of_something_else_than_streams() -> None:
    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixing = nn.Linear(3, 4)

        def forward(self, condition: Tensor) -> StreamMappings:
            mixing = self.mixing(condition).unflatten(-1, (2, 2))
            return StreamMappings(mixing[..., 0], mixing[..., 1], mixing)

    layers = nn.ModuleList(Conditioned() for _ in range(3))
    condition = torch.randn(5, 3).requires_grad_()

    def once() -> Any:
        return [layer(condition) for layer in layers]

    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert after(layers, lambda: (once(), once())) == [None, 0, 1, None, 3, 4]
