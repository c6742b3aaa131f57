"""Documents that are kept apart: packed in one sequence they are as each of them alone."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import CONNECTIONS, MEMORIES, scrambled, tiny_transformer
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from mhc_lightning.data.document_mask import keep_documents_apart
from mhc_lightning.errors import UserError
from mhc_lightning.generation import Sampling, generate_together
from mhc_lightning.language_model import inputs_and_targets
from mhc_lightning.modules import Engram, OverEncoding, Transformer, document_attention
from mhc_lightning.modules.block import PreNorm
from mhc_lightning.modules.document_attention import attention_within
from mhc_lightning.modules.documents import Documents, block_mask_of

END = 7
# Lengths of the documents of two rows, of 21 tokens each; the last document of a row goes on.
ROWS = ([5, 1, 9, 6], [2, 1, 1, 17])


def make(connection: str = "mhc", memory: str | None = None, **changes: Any) -> Transformer:
    if memory is not None:
        changes["memory"] = MEMORIES[memory]
    network: Transformer = scrambled(tiny_transformer(connection, **changes).double(), seed=1)
    network.memory.bind(np.arange(40), END)
    return network


def packed_rows() -> tuple[Tensor, list[list[Tensor]]]:
    """Tokens [2, 21], and the documents of each row."""
    documents = []
    for lengths in ROWS:
        row = [torch.randint(8, 40, (length,)) for length in lengths]
        for document in row[:-1]:
            document[-1] = END
        documents.append(row)
    return torch.stack([torch.cat(row) for row in documents]), documents


def gradients(network: Transformer, loss: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    loss.backward()
    grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {n: g.to_dense() if g.is_sparse else g.clone() for n, g in grads.items()}


def assert_close(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, wanted in expected.items():
        assert (ours[name] - wanted).abs().max() <= 1e-10 * wanted.abs().max(), name


@pytest.mark.parametrize("connection", CONNECTIONS)
@pytest.mark.parametrize("memory", [None, "engram"])
def test_packed_documents_are_as_each_alone(connection: str, memory: str | None) -> None:
    """Logits, losses and gradients, with experts; the loss is the mean over all that count."""
    check_against_documents_alone(make(connection, memory))


@pytest.mark.parametrize("memory", ["engram_without_conv", "over_encoding"])
def test_documents_with_other_memories(memory: str) -> None:
    check_against_documents_alone(make(memory=memory))


def check_against_documents_alone(network: Transformer) -> None:
    tokens, rows = packed_rows()
    documents = [document for row in rows for document in row]
    logits = torch.cat([network(document[None])[0] for document in documents])
    # In a batch the token after a row belongs to its last document.
    alone = [F.pad(document, (0, 1), value=9 if document is row[-1] else -100)
             for row in rows for document in row]  # fmt: skip
    losses = torch.cat(
        [network.token_losses(d[None, :-1].clamp(min=0), d[None, 1:])[0] for d in alone]
    )
    targets = [d[None, 1:] for d in alone]
    counts = [int((t >= 0).sum()) for t in targets]
    assert sum(counts) == tokens.numel() - sum(len(row) - 1 for row in rows)
    total: Any = sum(
        network.loss(d[None, :-1], t) * count
        for d, t, count in zip(alone, targets, counts, strict=True)
        if count
    )
    expected = gradients(network, total / sum(counts))

    network.mask_documents(END)
    batch = F.pad(tokens, (0, 1), value=9)
    inputs, masked = inputs_and_targets(batch, END)
    assert (network(tokens).flatten(0, 1) - logits).abs().max() <= 1e-10 * logits.abs().max()
    ours = network.token_losses(inputs, masked).flatten()
    assert (ours - losses).abs().max() <= 1e-10 * losses.abs().max()
    loss = network.loss(inputs, masked)
    assert float((loss - total / sum(counts)).abs().detach()) <= 1e-10
    assert_close(gradients(network, loss), expected)

    network.mask_documents(None)
    assert not torch.allclose(network(tokens).flatten(0, 1), logits)


def test_over_decoding_predicts_no_token_of_another_document() -> None:
    memory = partial(OverEncoding, rows=57, num_heads=2, dim=8, over_decoding_weight=0.3)
    network = scrambled(tiny_transformer(memory=memory).double(), seed=1)
    network.memory.bind(np.arange(40), END)
    assert network.training and network.head_memory is not None
    check_against_documents_alone(network)


def test_recomputation_changes_no_bit() -> None:
    network = make(memory="engram", num_layers=3)
    network.mask_documents(END)
    inputs, targets = inputs_and_targets(packed_rows()[0], END)
    seen = []
    for recompute in ("off", 3):
        network.set_recompute(recompute)
        seen.append(gradients(network, network.loss(inputs, targets)))
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0])


@pytest.mark.parametrize("memory", [None, "engram", "over_encoding"])
def test_a_cache_shows_a_document_nothing_of_the_one_before(memory: str | None) -> None:
    """Rows of unequal lengths are continued in pieces that end in the middle of documents."""
    network = make(memory=memory).eval()
    network.mask_documents(END)
    tokens, _ = packed_rows()
    whole = network(tokens)
    caches = network.new_caches(2, 40)
    done = torch.zeros(2, dtype=torch.int64)
    for counts in ([6, 2], [1, 1], [8, 1], [1, 4], [3, 8]):
        size = max(counts)
        piece = torch.stack(
            [F.pad(row[at : at + n], (0, size - n), value=END)
             for row, at, n in zip(tokens, done.tolist(), counts, strict=True)]
        )  # fmt: skip
        with torch.no_grad():
            logits = network.forward_cached(piece, caches, torch.tensor(counts))
        done = done + torch.tensor(counts)
        expected = whole[torch.arange(2), done - 1]
        assert (logits - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_generation_of_several_prompts_is_that_of_their_last_documents() -> None:
    network = make(memory="engram").eval()
    tokens, rows = packed_rows()
    prompts = [row[:n].tolist() for row, n in zip(tokens, (17, 9), strict=True)]
    last = [rows[0][3][:2].tolist(), rows[1][3][:5].tolist()]
    drawn = []
    for given, mask in ((prompts, END), (last, None)):
        network.mask_documents(mask)
        sampling = [Sampling(n, temperature=0) for n in (6, 3)]
        drawn.append(list(generate_together(network, given, sampling)))
    assert drawn[0] == drawn[1] and len(drawn[0]) == 9


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.numel())
        return result


def visible(starts: Tensor) -> Tensor:
    """Which keys each query sees, bool [B, 1, S, S]: an independent statement of the mask."""
    at = torch.arange(starts.shape[1])
    return ((at <= at[:, None]) & (starts[:, :, None] == starts[:, None]))[:, None]


def test_no_tensor_has_an_entry_for_every_pair_of_positions() -> None:
    """Forward and backward of attention, and of a network; a mask of all pairs would be seen."""
    length = 512
    tokens = torch.randint(8, 40, (1, length))
    tokens[0, [100, 101, 420]] = END
    documents = Documents.of(tokens, END)
    query, key = (torch.randn(1, 2, length, 24, requires_grad=True) for _ in range(2))
    value = torch.randn(1, 2, length, 16, requires_grad=True)
    with Largest() as ours:
        mixed = attention_within(documents, query, key, value)
        ours_grads = torch.autograd.grad(mixed.sin().sum(), (query, key, value))
    with Largest() as all_pairs:
        mask = visible(documents.starts)
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        grads = torch.autograd.grad(expected.sin().sum(), (query, key, value))
    assert ours.elements < length**2 / 8 and all_pairs.elements >= length**2
    assert (mixed - expected).abs().max() < 1e-5
    for one, other in zip(ours_grads, grads, strict=True):
        assert (one - other).abs().max() < 1e-5
    network = make(memory="engram").float()
    network.mask_documents(END)
    with Largest() as largest:
        network.loss(*inputs_and_targets(tokens, END)).backward()
    assert largest.elements < length**2 / 4


@pytest.mark.parametrize("length", [1, 127, 128, 129, 600])
def test_the_block_mask_is_that_of_torch(length: int) -> None:
    """Which blocks are left out, seen in part, and seen whole; any documents."""
    tokens = torch.randint(0, 150, (3, length))
    tokens[2, :] = 1  # one document
    starts = Documents.of(tokens, 0).starts
    ours = block_mask_of(starts)
    assert ours.mask_mod is not None
    theirs = create_block_mask(ours.mask_mod, 3, None, length, length, device="cpu")
    assert ours.shape == theirs.shape and torch.equal(ours.to_dense(), theirs.to_dense())
    for kind in ("kv", "full_kv", "q", "full_q"):
        numbers, expected = (getattr(mask, f"{kind}_num_blocks") for mask in (ours, theirs))
        assert torch.equal(numbers, expected), kind
        at, theirs_at = (getattr(mask, f"{kind}_indices") for mask in (ours, theirs))
        used = torch.arange(at.shape[-1]) < numbers[..., None]
        assert torch.equal(at[used], theirs_at[used]), kind
    at = torch.arange(length)
    rows = torch.arange(3)[:, None, None]
    seen = ours.mask_mod(rows, torch.zeros(1), at[:, None], at)
    assert torch.equal(seen, visible(starts)[:, 0])


def test_flex_attention_gives_what_documents_one_by_one_give(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The way of a GPU, with torch's uncompiled forward pass; CPUs have no backward pass of it."""
    network = scrambled(tiny_transformer(head_dim=16, rope_dim=8), seed=1)
    network.mask_documents(END)
    tokens, _ = packed_rows()
    with torch.no_grad():
        expected = network(tokens)
        calls = []

        def uncompiled(*args: Any, **kwargs: Any) -> Any:
            calls.append(kwargs)
            return flex_attention(*args, **kwargs)

        def with_mask(tokens: Tensor, end: int) -> Documents:
            documents = of(tokens, end)
            documents.block_mask = block_mask_of(documents.starts)
            return documents

        of = Documents.of
        monkeypatch.setattr(Documents, "of", with_mask)
        monkeypatch.setattr(document_attention, "_flex_attention", lambda: uncompiled)
        assert (network(tokens) - expected).abs().max() < 1e-5 * expected.abs().max()
        assert len(calls) == 2
        network.double()(tokens)
    assert len(calls) == 2  # not in float64


def test_compiled_sub_layers_take_any_documents() -> None:
    """They are compiled once, whatever the documents."""
    network = make()
    network.mask_documents(END)
    tokens, _ = packed_rows()
    batches = [tokens, tokens.roll(3, 1), tokens.roll(8, 1)]
    expected = [gradients(network, network(batch).sin().sum()) for batch in batches]
    compiled = []

    def backend(graph: Any, example: Any) -> Any:
        compiled.append(graph)
        return graph

    for module in network.modules():
        if isinstance(module, PreNorm):
            module.compile(backend=backend)
    counts = []
    for batch, wanted in zip(batches, expected, strict=True):
        assert_close(gradients(network, network(batch).sin().sum()), wanted)
        counts.append(len(compiled))
    assert counts[0] > 0 and counts[-1] == counts[0]


def test_what_cannot_be_kept_apart_is_refused() -> None:
    network = make()
    with pytest.raises(UserError, match=r"by token 40: its tokens are 0 to 39"):
        network.mask_documents(40)
    memory = partial(Engram, rows=31, num_heads=2, dim=8, documents=False)
    with pytest.raises(UserError, match=r"use memory.documents=true"):
        tiny_transformer(memory=memory).mask_documents(END)
    unbound = tiny_transformer(memory=MEMORIES["engram"])
    with pytest.raises(UserError, match="needs the tokenizer of the data"):
        keep_documents_apart(unbound, END)
    unbound.memory.bind_alone()
    for other in (unbound, make(memory="engram")):
        with pytest.raises(UserError, match="is bound to another tokenizer, or to none"):
            keep_documents_apart(other, END + 1)
    with pytest.raises(UserError, match="Linear has no method mask_documents"):
        keep_documents_apart(torch.nn.Linear(1, 1), END)
    keep_documents_apart(torch.nn.Linear(1, 1), None)


def test_positions_count_from_the_first_token_of_each_document() -> None:
    tokens = torch.tensor([[END, 8, END, END, 8, 8], [8, 8, 8, END, 8, END]])
    documents = Documents.of(tokens, END)
    assert documents.positions.tolist() == [[0, 0, 1, 0, 0, 1], [0, 1, 2, 3, 0, 1]]
    assert documents.spans == [[1, 2, 1, 2], [4, 2]]
