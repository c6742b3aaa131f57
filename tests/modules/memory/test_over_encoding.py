"""Over-Encoding computes the paper's sum, hashed by the paper's polynomial."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from memory_reference import over_encoding
from networks import CONNECTIONS, tiny_transformer
from ngram_reference import Spelling, polynomial, suffix
from torch import Tensor
from torch.func import functional_call

from mhc_lightning.errors import UserError
from mhc_lightning.modules import OverEncoding
from mhc_lightning.modules.memory.over_encoding import OverEncodingInput

V, C, LENGTH, END = 40, 12, 17, 5

FORMS: dict[str, dict[str, Any]] = {
    "paper": {"documents": False, "word_scale": "mean"},
    "document starts": {},
    "four orders": {"orders": (2, 3, 4), "word_scale": "full", "dim": 8},
    "classes": {"compress": True, "pad_token": None, "num_heads": 1, "dim": 5},
}
forms = pytest.mark.parametrize("form", FORMS)


def small_memory(**settings: Any) -> OverEncoding:
    memory = OverEncoding(
        vocab_size=V, model_dim=C, **{"rows": 1001, "num_heads": 2, **settings}, num_layers=3
    )
    memory.bind(np.arange(V) % 29, END)
    return memory


def part_of(memory: OverEncoding, dtype: torch.dtype = torch.float64) -> OverEncodingInput:
    """Its part, with parameters that all matter."""
    part = memory.input_memory()
    assert isinstance(part, OverEncodingInput)
    part.to(dtype)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    return part


def reference(memory: OverEncoding, part: OverEncodingInput, tokens: Tensor, x: Tensor) -> Tensor:
    """The output for tokens [B, S] and embeddings [B, S, C], hashed by the reference as well."""
    assert memory.hash is not None
    layout = memory.hash.layout
    classes = [token % 29 for token in range(V)] if memory.compress else list(range(V))
    pad = classes[END if memory.pad_token is None else memory.pad_token]
    spelling = Spelling(classes, pad, END if memory.documents else None)
    table = part.table.weight.detach().double().numpy()
    table = table.reshape(layout.heads, layout.rows_per_head, -1)
    projection = part.projection.weight.detach().double().numpy()
    batch = []
    for text, embedded in zip(tokens.tolist(), x, strict=True):
        rows, projections = [], []
        for head, modulus in enumerate(layout.moduli[0]):
            order = layout.orders[head // layout.num_heads]
            grams = [suffix(spelling, text, position, order) for position in range(len(text))]
            rows.append(np.stack([table[head, polynomial(g, V) % modulus] for g in grams]))
            width = table.shape[-1]
            projections.append(projection[:, head * width : (head + 1) * width])
        divided = memory.shape_settings["word_scale"] == "mean"
        batch.append(over_encoding(embedded.detach().numpy(), rows, projections, divided))
    return torch.from_numpy(np.stack(batch))


def inputs() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(V, (2, LENGTH))
    tokens[0, 6], tokens[1, 0] = END, END
    return tokens, torch.randn(2, LENGTH, C, dtype=torch.float64)


@forms
def test_values_are_the_references(form: str) -> None:
    memory = small_memory(**FORMS[form])
    tokens, x = inputs()
    recalled, part = memory.recall(tokens), part_of(memory)
    expected = reference(memory, part, tokens, x)
    found = part(x, recalled)
    assert (found - expected).abs().max() < 1e-12 * expected.abs().max()
    found = part_of(memory, torch.float32)(x.float(), recalled)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 2e-6 * expected.abs().max()


@forms
def test_gradients_are_the_references_differences(form: str) -> None:
    """The output is linear in the rows, the projection and the embedding, each by itself."""
    memory = small_memory(**FORMS[form])
    tokens, x = inputs()
    recalled, part = memory.recall(tokens), part_of(memory)
    weight = torch.randn(x.shape, dtype=torch.float64)
    (part(x.requires_grad_(), recalled) * weight).sum().backward()
    for target in (*part.parameters(), x):
        direction, values, sides = torch.randn_like(target), target.detach().clone(), []
        for sign in (1, -1):
            with torch.no_grad():
                target.copy_(values + sign * direction)
            sides.append(float((reference(memory, part, tokens, x) * weight).sum()))
        with torch.no_grad():
            target.copy_(values)
        assert target.grad is not None
        numeric = (sides[0] - sides[1]) / 2
        assert float((target.grad * direction).sum()) == pytest.approx(numeric, rel=1e-10)
        assert numeric != 0


def test_gradients_pass_gradcheck() -> None:
    memory = small_memory()
    tokens, x = inputs()
    recalled, part = memory.recall(tokens), part_of(memory)
    names, parameters = zip(*part.named_parameters(), strict=True)

    def call(x: Tensor, *own: Tensor) -> Tensor:
        return functional_call(part, dict(zip(names, own, strict=True)), (x, recalled))

    assert torch.autograd.gradcheck(call, (x.requires_grad_(), *parameters), fast_mode=True)


@pytest.mark.parametrize("connection", CONNECTIONS)
def test_a_network_embeds_with_it(connection: str) -> None:
    plain = tiny_transformer(connection)
    model = tiny_transformer(connection, memory=partial(OverEncoding, rows=101))
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    tokens = torch.randint(V, (2, 11))
    recalled = model.recall(tokens)
    expected = model.input_memory(model.embedding(tokens), recalled)
    assert torch.equal(model.embed(tokens)[:, :, 0], expected)
    assert model.blocks[0].memory is None and model.blocks[1].memory is None
    assert not torch.equal(model(tokens), plain(tokens))


@pytest.mark.parametrize("rows", [40 * 3, 40 * 3 - 2, 40 * 3 - 14])
def test_rows_that_are_a_multiple_of_the_vocabulary_are_refused(rows: int) -> None:
    with pytest.raises(UserError, match=r"a head 120 rows, a multiple of the 40 tokens") as error:
        OverEncoding(vocab_size=V, model_dim=C, rows=rows)
    better = int(str(error.value).rpartition("=")[2])
    OverEncoding(vocab_size=V, model_dim=C, rows=better)
