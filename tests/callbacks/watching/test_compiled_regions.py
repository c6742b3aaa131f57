"""Watching what torch.compile has compiled, with a backend that compiles nothing further."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mhc_lightning.callbacks import AmaxGain, StreamDiversity, StreamMatrixHeatmap
from mhc_lightning.callbacks.watching.compiled_regions import modules_in_compiled_regions
from mhc_lightning.callbacks.watching.observations import predecessors
from mhc_lightning.callbacks.watching.stream_watcher import StreamWatcher
from mhc_lightning.kernels import StreamMappings
from mhc_lightning.language_model import LanguageModel
from mhc_lightning.modules import ManifoldHyperConnection, Transformer
from mhc_lightning.optimizers.recipes import AdamWRecipe


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch.compiler.reset()
    before = torch._dynamo.config.skip_nnmodule_hook_guards
    yield
    assert torch._dynamo.config.skip_nnmodule_hook_guards == before
    torch.compiler.reset()


class Counting:
    """The eager backend, counting compiled programs."""

    def __init__(self) -> None:
        self.programs = 0

    def __call__(self, graph: Any, example_inputs: Any) -> Callable[..., Any]:
        self.programs += 1
        return graph.forward


def compile_wrapped(module: Any, backend: Any) -> None:
    compiled: Any = torch.compile(
        torch.nn.Sequential(*module.mixers), backend=backend, fullgraph=True
    )
    module.mixers = torch.nn.ModuleList([compiled])
    module.mixers[0].n = 2


def compile_each(module: Any, backend: Any) -> None:
    for mixer in module.mixers:
        mixer.compile(backend=backend, fullgraph=True)


def extract_outputs(module: Any, args: Any, output: Any) -> StreamMappings | None:
    return output if isinstance(output, StreamMappings) else None


@pytest.mark.parametrize(
    ("compiled", "layers", "extract"),
    [(compile_wrapped, 3, None), (compile_each, 10, extract_outputs)],  # dynamo caches 8 programs
)
def test_compiled_models_give_the_same_numbers_without_further_compilation(
    foreign: Any, fit: Any, compiled: Any, layers: int, extract: Any
) -> None:
    def train(compile_it: Any, *watched: Any) -> tuple[list[dict[str, float]], int]:
        torch.manual_seed(0)
        module, backend = foreign.Module(layers=layers), Counting()
        if compile_it is not None:
            compile_it(module, backend)
        fit(module, *watched, max_steps=6)
        assert not any(m._forward_hooks for m in module.modules())
        return [callback.last for callback in watched], backend.programs

    def instruments() -> list[Any]:
        heatmap = StreamMatrixHeatmap(every_n_steps=100, extract=extract)
        return [AmaxGain(2, extract), StreamDiversity(2, extract), heatmap]

    eager, _ = train(None, *instruments())
    _, unwatched = train(compiled)
    numbers, programs = train(compiled, *instruments())
    for expected, value in zip(eager, numbers, strict=True):
        assert value == pytest.approx(expected, rel=1e-5)
    # Unwatched, watched, and at the last step watched by the heat map as well: one set of
    # programs each, however many samples and however many layers.
    assert programs == 3 * unwatched


def test_a_lightning_module_compiled_as_a_whole(foreign: Any, fit: Any) -> None:
    class Quiet(foreign.Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (self(batch) - 1).square().mean()

    def train(compile_it: bool) -> dict[str, float]:
        torch.manual_seed(0)
        module, gain = Quiet(layers=2), AmaxGain(2)
        fit(torch.compile(module, backend="aot_eager") if compile_it else module, gain, max_steps=4)
        return gain.last

    assert train(True) == pytest.approx(train(False), rel=1e-5)


def test_regions_without_anything_to_watch_are_left_alone(fit: Any) -> None:
    network = Transformer(
        connection=ManifoldHyperConnection, vocab_size=16, dim=8, num_layers=2, num_streams=2,
        num_heads=1, head_dim=4, rope_dim=2, kv_rank=4, ffn_dim=8,
    )  # fmt: skip
    backend = Counting()
    for block in network.blocks:
        block.attention.compile(backend=backend)
        block.feed_forward.compile(backend=backend)
    module = LanguageModel(network, AdamWRecipe(lr=1e-3, warmup_steps=1))
    gain = AmaxGain(2)
    programs: list[int] = []
    flags: list[bool] = []

    class Spy(AmaxGain):
        def on_train_batch_start(self, *args: Any) -> None:
            programs.append(backend.programs)
            flags.append(torch._dynamo.config.skip_nnmodule_hook_guards)

        on_train_batch_end = on_before_backward = on_train_batch_start  # type: ignore[assignment]

    tokens: Any = torch.randint(0, 16, (64, 9))
    data = torch.utils.data.DataLoader(tokens, batch_size=2)
    fit(module, gain, Spy(), max_steps=6, data=data)
    assert len([tag for tag in gain.last if "composite/forward/layer_" in tag]) == 4
    inside = modules_in_compiled_regions(module)
    assert network.blocks[0].attention.norm in inside
    assert network.blocks[0].attention_connection.window not in inside
    assert all(flags)  # dynamo's setting was never touched
    assert programs[-1] == programs[3]  # nothing was compiled after the first step


@pytest.mark.parametrize("mode", ["grad", "no_grad"])
@pytest.mark.parametrize("compiled", [compile_wrapped, compile_each])
def test_chains_through_compiled_programs(foreign: Any, compiled: Any, mode: str) -> None:
    module, x = foreign.Module(layers=3), torch.randn(2, 5, 4)
    compiled(module, Counting())

    def two_views() -> Any:
        return module(x), module(2 * x)

    def loop() -> torch.Tensor:
        streams = x.unsqueeze(-2).expand(-1, -1, 2, -1)
        for mixer in [*module.mixers, *module.mixers]:
            streams = mixer(streams.double().float() if mode == "grad" else streams)
        return streams

    watcher = StreamWatcher()
    watcher.prepare(module)
    try:
        with torch.set_grad_enabled(mode == "grad"):
            for call, expected in (
                (two_views, [None, 0, 1, None, 3, 4]),
                (loop, [None, 0, 1, 2, 3, 4]),
            ):
                watcher.open(module)
                call()
                assert predecessors(watcher.close()) == expected
    finally:
        watcher.release()


def test_a_module_met_again_within_one_program_begins_a_chain_and_is_told(foreign: Any) -> None:
    class Views(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = foreign.Module(layers=2)

        def forward(self, x: torch.Tensor) -> Any:
            return self.inner(x), self.inner(2 * x)

    compiled: Any = torch.compile(Views(), backend=Counting())
    root = torch.nn.ModuleList([compiled])
    watcher = StreamWatcher()
    watcher.prepare(root)
    try:
        for warned in (True, False):
            watcher.open(root)
            root[0](torch.randn(2, 5, 4))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert predecessors(watcher.close()) == [None, 0, None, 2]
            told = ["more than once in one compiled program" in str(w.message) for w in caught]
            assert any(told) == warned
    finally:
        watcher.release()
