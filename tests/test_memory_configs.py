"""Shipped memories: the hash, the tables and the parts of the models that they are named after."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from ngram_reference import Spelling, multiply_xor, polynomial, suffix

from mhc_lightning.cli.arguments import parse_arguments
from mhc_lightning.cli.components import build_model
from mhc_lightning.cli.composition import compose_experiment
from mhc_lightning.modules.memory.hashing import NgramHash

SIZES = ("model.num_layers=16", "model.dim=64", "recompute=off")


def network(*words: str) -> Any:
    """The network of a quickstart without values."""
    arguments = parse_arguments(["fit", "--config", "mhc_quickstart", *SIZES, *words])
    return build_model(compose_experiment(arguments), on_meta=True).model


def hash_of(model: Any, classes: np.ndarray, end: int) -> NgramHash:
    """The network's hash with values, bound to a tokenizer."""
    memory = model.memory
    memory.bind(classes, end)
    memory.hash.to_empty(device="cpu").reset_parameters()
    return memory.hash


def rows_by_hand(hashing: NgramHash, spelling: Spelling, tokens: list[int]) -> list[Any]:
    """[L][S][H] by the reference, with the moduli and multipliers of the hash."""
    layout = hashing.layout
    return [
        [
            [
                head * layout.rows_per_head
                + (
                    polynomial(gram, hashing.vocab_size)
                    if hashing.scheme == "polynomial"
                    else multiply_xor(gram, hashing.multipliers[table].tolist())
                )
                % modulus
                for head, modulus in enumerate(moduli)
                for gram in [suffix(spelling, tokens, t, layout.orders[head // layout.num_heads])]
            ]
            for t in range(len(tokens))
        ]
        for table, moduli in enumerate(layout.moduli)
    ]


def text(vocab_size: int, end: int) -> list[int]:
    drawn = np.random.default_rng(3).integers(0, vocab_size, 40).tolist()
    drawn[0], drawn[13], drawn[14], drawn[20:23] = vocab_size - 1, end, vocab_size - 2, [end] * 3
    return drawn


def test_engram_v41() -> None:
    model = network("memory=engram_v41", "memory.rows=16000000", "memory.layers=[1,14]",
                    "memory.dim=2048", "memory.pad_token=2", "model.vocab_size=129280")  # fmt: skip
    # As many classes as its tokenizer has: 99,092. Any of that number have its multipliers.
    classes = np.minimum(np.arange(129_280), 99_091)
    hashing = hash_of(model, classes, end=1)
    assert [hashing.layout.used_rows(table) for table in (0, 1)] == [384_006_168, 384_016_682]
    assert hashing.multipliers.tolist() == [
        [76632096046245, 4839876093313, 35959672319349, 73987337458391],
        [67716810739261, 51510806800915, 30921347202721, 82619226485591],
    ]
    tokens = text(129_280, end=1)
    rows = hashing(torch.tensor([tokens]))[:, 0]
    assert rows.shape == (2, 40, 24)
    assert rows.tolist() == rows_by_hand(hashing, Spelling(classes.tolist(), 2, 1), tokens)
    part = model.blocks[14].memory
    assert part.table.weight.shape[-1] == 256
    assert part.key.weight.shape == (4 * 64, 24 * 256) and part.key.bias is None
    assert part.value.weight.shape == (64, 24 * 256) and part.value.bias is None
    assert part.conv is None


def test_engram_qwen() -> None:
    vocab_size, end = 248_320, 248_044
    model = network("memory=engram_qwen", "memory.rows=20000000", "memory.dim=1280",
                    f"model.vocab_size={vocab_size}")  # fmt: skip
    hashing = hash_of(model, np.zeros(vocab_size, dtype=np.int64), end)  # no classes are taken
    assert hashing.layout.used_rows(0) == 320_001_446
    assert hashing.layout.moduli[0][::15] == (20000003, 20000171)
    assert hashing.multipliers.tolist() == [[23703573157769, 20109073645365, 8052911324071]]
    assert hashing.pad.tolist() == [end] == hashing.document_end.tolist()
    tokens = text(vocab_size, end)
    rows = hashing(torch.tensor([tokens]))[:, 0]
    assert rows.shape == (1, 40, 16)
    assert rows.tolist() == rows_by_hand(hashing, Spelling(range(vocab_size), end, end), tokens)
    part = model.blocks[1].memory
    assert [block.memory is not None for block in model.blocks] == [False, True] + [False] * 14
    assert part.table.weight.shape[-1] == 160
    assert (part.conv.kernel, part.conv.dilation, part.conv.reach) == (4, 3, 9)
    assert part.key.bias is None and part.value.bias is None


def test_longcat() -> None:
    vocab_size, end, ratio = 131_072, 2, 78
    model = network("memory=longcat", "memory.rows=10223617", "model.dim=3072",
                    f"model.vocab_size={vocab_size}")  # fmt: skip
    hashing = hash_of(model, np.arange(vocab_size), end)
    moduli = hashing.layout.moduli[0]
    assert list(moduli) == [int(ratio * vocab_size + 2 * i + 1) for i in range(12)]
    part = model.input_memory
    assert part.table.weight.shape[-1] == 256
    # The published 31.4 billion.
    assert round(sum(moduli) * 256 / 1e9, 1) == 31.4
    assert part.projection.weight.shape == (3072, 12 * 256)
    assert part.scale == part.word_scale == 1 / 13
    tokens = text(vocab_size, end)
    rows = hashing(torch.tensor([tokens]))[:, 0]
    assert rows.tolist() == rows_by_hand(hashing, Spelling(range(vocab_size), 0, end), tokens)
    sparse = network("memory=longcat", "memory.word_scale=full").input_memory
    assert (sparse.word_scale, sparse.scale) == (1, 1 / 13)


def test_longcat_at_the_size_of_a_desk_has_its_ratio() -> None:
    layout = network("memory=longcat").memory.hash.layout
    assert layout.moduli[0][0] == 78 * 257 + 1
    assert {b - a for a, b in pairwise(layout.moduli[0])} == {2}


@pytest.mark.parametrize(
    "name", ["engram", "engram_v41", "engram_qwen", "over_encoding", "longcat"]
)
def test_one_word_turns_it_on(name: str) -> None:
    model = network(f"memory={name}")
    assert model.memory.hash is not None
    parts = [block.memory for block in model.blocks if block.memory is not None]
    if name in ("over_encoding", "longcat"):
        assert model.input_memory is not None and not parts
    else:
        assert model.input_memory is None and parts
