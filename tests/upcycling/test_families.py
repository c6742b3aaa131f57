"""Every family with an adapter stays the same function, and is used as before.

``WRITE_DOCS=1`` writes the table of docs/your_project/upcycling_families.md.
"""

import copy
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, REFUSED, Family, referee, tokens
from networks import CONNECTIONS, scrambled
from torch import Tensor, nn

from mhc_lightning.errors import UserError
from mhc_lightning.modules import Connection, ManifoldHyperConnection
from mhc_lightning.upcycling import upcycle

pytestmark = pytest.mark.filterwarnings("ignore")


@cache
def _built(family: Family) -> Any:
    return family.build()


def model_of(family: Family) -> Any:
    """A model of the family, in evaluation mode."""
    return copy.deepcopy(_built(family))


def output_of(model: Any, family: Family, **changes: Any) -> Tensor:
    """What the model returns for the family's inputs, in the dtype of its parameters."""
    dtype = next(model.parameters()).dtype
    inputs = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in family.inputs().items()
    }
    return model(**inputs, **changes)[family.output]


@cache
def _expected(family: Family) -> Tensor:
    """The output of the original model, computed in float64 throughout."""
    with referee(), torch.no_grad():
        return output_of(model_of(family).double(), family)


def connections_of(model: nn.Module) -> list[Connection]:
    return [module for module in model.modules() if isinstance(module, Connection)]


def stirred(model: Any) -> Any:
    """The model, its connections moved, so that streams differ and all mappings matter."""
    for connection in connections_of(model):
        scrambled(connection, scale=0.3, seed=connection.layer_index)
    return model


def check_function(family: Family) -> None:
    expected = _expected(family)
    scale = expected.abs().max()
    for name, connection in CONNECTIONS.items():
        wide = upcycle(model_of(family), connection=connection, num_streams=4)
        with torch.no_grad():
            difference = (output_of(wide, family) - expected).abs().max() / scale
        assert difference <= 1e-5, name
    with referee(), torch.no_grad():
        wide = upcycle(model_of(family), connection=ManifoldHyperConnection).double()
        assert (
            output_of(wide, family) - expected
        ).abs().max() <= 1e-7 * scale  # weights are of float32 logits


def check_gradients(family: Family) -> None:
    """In training, with the same dropout as the original's."""
    results = []
    for model in (model_of(family), upcycle(model_of(family), ManifoldHyperConnection)):
        torch.manual_seed(3)
        with referee():
            output = output_of(model.double().train(), family)
            output.square().mean().backward()
        results.append((output.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (expected, gradients), (found, wide_gradients) = results
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert wide_gradients.keys() > gradients.keys()
    for name, gradient in gradients.items():
        if gradient is not None:
            torch.testing.assert_close(wide_gradients[name], gradient, rtol=1e-5, atol=1e-8)


def check_generation(family: Family) -> None:
    """With streams that differ, so that the cache holds what the streams were read as."""
    settings = {
        "do_sample": False,
        "min_new_tokens": 5,
        "max_new_tokens": 5,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    wide = stirred(upcycle(model_of(family), ManifoldHyperConnection))
    cached, full, original = (
        model.generate(tokens(2, 6), use_cache=use_cache, **settings)
        for model, use_cache in ((wide, True), (wide, False), (model_of(family), True))
    )
    assert torch.equal(cached.sequences, full.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(full.logits))
    assert (original.logits[0] - full.logits[0]).abs().max() > 1e-3


def check_checkpointing(family: Family) -> None:
    """The same gradients, and each block's mappings computed twice."""
    results, passes = [], []
    for checkpoints in (False, True):
        wide = stirred(upcycle(model_of(family), ManifoldHyperConnection)).train()
        if checkpoints:
            enable = getattr(wide, "gradient_checkpointing_enable", None)
            (enable or wide.enable_gradient_checkpointing)()
        seen: list[None] = []
        for connection in connections_of(wide):
            connection.window.register_forward_hook(lambda *_, seen=seen: seen.append(None))
        torch.manual_seed(3)
        output_of(wide, family).square().mean().backward()
        results.append({name: p.grad for name, p in wide.named_parameters()})
        passes.append(len(seen))
    assert passes[1] == 2 * passes[0] > 0
    torch.testing.assert_close(*results)


CHECKS: dict[str, Callable[[Family], None]] = {
    "same function": check_function,
    "training": check_gradients,
    "cached generation": check_generation,
    "gradient checkpointing": check_checkpointing,
}


def applies(check: str, family: Family) -> bool:
    return check != "cached generation" or family.generates


@pytest.mark.parametrize(
    ("family", "check"),
    [
        pytest.param(family, check, id=f"{family.name}-{check}")
        for family in FAMILIES
        for check in CHECKS
        if applies(check, family)
    ],
)
def test_each_family(family: Family, check: str) -> None:
    CHECKS[check](family)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_its_blocks_are_wide_and_keep_their_names(family: Family) -> None:
    model = model_of(family)
    names = [name for name, _ in model.named_parameters()]
    blocks = [name for name, module in model.named_modules() if _is(module, family.block)]
    wide = upcycle(model, ManifoldHyperConnection)
    assert len(blocks) == 2
    assert [name for name, m in wide.named_modules() if _is(m, family.block)] == blocks
    kept = [name for name, _ in wide.named_parameters() if ".connections." not in name]
    assert kept == names
    count = int(family.adds.rsplit(" ", 1)[1])
    assert [c.layer_index for c in connections_of(wide)] == list(range(2 * count))


def _is(module: nn.Module, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(module).__mro__)


@pytest.mark.parametrize("name", REFUSED)
def test_the_others_are_refused_with_a_reason(name: str) -> None:
    build, reason = REFUSED[name]
    model = build()
    with pytest.raises(UserError, match=re.escape(reason)):
        upcycle(model)
    assert not any(isinstance(module, Connection) for module in model.modules())


def refused_table() -> str:
    """The models that are refused, and why."""
    rows = [f"| {name} | {reason} |" for name, (_, reason) in REFUSED.items()]
    return "\n".join(["| model | its blocks |", "|---|---|", *rows])


def family_table() -> str:
    """The families, and what was checked of each."""
    lines = [
        f"| family | block | adds | {' | '.join(CHECKS)} |",
        f"|---|---|---|{'---|' * len(CHECKS)}",
    ]
    for family in FAMILIES:
        cells = ["works" if applies(check, family) else "has no cache" for check in CHECKS]
        cells = [family.name, f"`{family.block}`", family.adds, *cells]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_page_is_made_of_the_checks(repository: Path) -> None:
    page = repository / "docs/your_project/upcycling_families.md"
    text = page.read_text(encoding="utf-8")
    for marker, table in (("families", family_table()), ("refused", refused_table())):
        pattern = rf"(<!-- {marker} -->\n).*(<!-- end of {marker} -->)"
        text, count = re.subn(pattern, rf"\1{table}\n\2", text, flags=re.DOTALL)
        assert count == 1
    if os.environ.get("WRITE_DOCS"):
        page.write_text(text, encoding="utf-8")
    assert page.read_text(encoding="utf-8") == text
