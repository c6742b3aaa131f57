"""The table of what composes with what: one probe for every cell, and the page made of them."""

from collections.abc import Callable
from typing import NamedTuple

PARTS = ("connections", "Transformer", "callbacks", "memory")

FEATURES = {
    "torch.compile": "`fullgraph=True` for connections; a whole network as `torch.compile(net)`",
    "torch.export": "with a named batch and sequence `Dim`",
    "func.grad, vjp": "through `functional_call`",
    "func.jacrev": "",
    "func.vmap": "over inputs, and over parameters (`stack_module_state`)",
    "func.jvp, jacfwd": "forward-mode derivatives, by `torch.autograd.forward_ad` too",
    "double backward": "`create_graph=True`, `hessian`",
    "DDP": "`DistributedDataParallel` put around it by the user; two processes",
    "FSDP2": "`fully_shard` called by the user; two processes",
    "adapters": "peft-shaped: a module with `base_layer` and two low-rank matrices",
    "dynamic quantisation": "`quantize_dynamic` of every `nn.Linear`",
    "checkpoint wrappers": "`torch.utils.checkpoint`, reentrant and not, and `checkpoint_wrapper`",
    "autocast": "bfloat16 and float16",
    "meta builds": "`to_empty` and `reset_parameters`, or Lightning's `init_module`",
    "EMA, SWA": "`AveragedModel`, Lightning's `EMAWeightAveraging`",
    "hooks": "forward and backward hooks, and parametrizations",
}


class Probe(NamedTuple):
    """One cell.

    Attributes:
        run: Raises where the pair does not compose, or gives other numbers than without.
        raises: The kind and part of the text of the error that one gets; None where it works.
        note: What else to know.
    """

    run: Callable[[], None]
    raises: tuple[type[Exception], str] | None
    note: str


PROBES: dict[tuple[str, str], Probe] = {}


def probe(
    feature: str, part: str, raises: tuple[type[Exception], str] | None = None, note: str = ""
) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Make a function the proof of one cell."""
    assert feature in FEATURES and part in PARTS and (feature, part) not in PROBES

    def register(run: Callable[[], None]) -> Callable[[], None]:
        PROBES[feature, part] = Probe(run, raises, note)
        return run

    return register


def rendered_page() -> str:
    """The page, of what the probes declare."""

    def cell(found: Probe) -> str:
        if found.raises is None:
            return f"works{found.note and '; ' + found.note}"
        kind, text = found.raises
        return f"`{kind.__name__}: {text}`{found.note and '; ' + found.note}"

    lines = [
        "# What composes with what",
        "",
        "Each cell is proved by a test of `tests/test_composition.py`, in tiny networks on a CPU:",
        "*works* says that outputs, gradients or logged gains equal those without the feature.",
        "*Connections* are all nine kinds; *memory* is Engram and Over-Encoding in a Transformer.",
        "This page is written by",
        '`WRITE_DOCS=1 make test ARGS="tests/test_composition.py"`.',
        "",
        f"| | {' | '.join(PARTS)} |",
        f"|---|{'---|' * len(PARTS)}",
    ]
    for feature, what in FEATURES.items():
        name = f"**{feature}**{what and ': ' + what}"
        cells = " | ".join(cell(PROBES[feature, part]) for part in PARTS)
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines) + "\n"
