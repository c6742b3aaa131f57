"""Rows of n-grams: exactly those of the references, whatever the pad, the documents, the past."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ngram_reference import (
    Spelling,
    as_int64,
    is_prime,
    multiply_xor,
    polynomial,
    prime_sizes,
    suffix,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from mhc_lightning.errors import UserError
from mhc_lightning.modules.memory.hashing import NOT_A_TOKEN, NgramHash
from mhc_lightning.modules.memory.layout import (
    ROW_MULTIPLE,
    NgramLayout,
    prime_layout,
    spaced_layout,
)

V = 50


def expected_rows(hashing: NgramHash, spelling: Spelling, tokens: list[int]) -> list[Any]:
    """[L][S][H] by the reference."""
    layout, step = hashing.layout, hashing.layout.rows_per_head
    tables = []
    for table, moduli in enumerate(layout.moduli):
        places = []
        for position in range(len(tokens)):
            rows = []
            for head, modulus in enumerate(moduli):
                order = layout.orders[head // layout.num_heads]
                gram = suffix(spelling, tokens, position, order)
                if hashing.scheme == "polynomial":
                    value = polynomial(gram, hashing.vocab_size)
                else:
                    value = multiply_xor(gram, hashing.multipliers[table].tolist())
                rows.append(head * step + value % modulus)
            places.append(rows)
        tables.append(places)
    return tables


def classes_of(vocab_size: int, generator: np.random.Generator) -> np.ndarray:
    """Classes, numbered in the order of first appearance."""
    drawn = generator.integers(0, vocab_size // 2, vocab_size)
    numbers: dict[int, int] = {}
    return np.array([numbers.setdefault(int(value), len(numbers)) for value in drawn])


def hashes() -> dict[str, NgramHash]:
    """A hash of each kind, not bound."""
    huge = [[2**62 + 5, 3**39, 2**61 + 1, 2**63 - 1]]
    return {
        "drawn": NgramHash(prime_layout([1, 4], [2, 3], 3, 40), V),
        "gap in the orders": NgramHash(prime_layout([0], [2, 4], 2, [40, 90]), V, seed=5),
        "one order, no bigram": NgramHash(prime_layout([2], [3], 2, 64), V),
        "wraps around": NgramHash(prime_layout([1], [2, 3, 4], 2, 40), V, multipliers=huge),
        "polynomial": NgramHash(spaced_layout([2, 3, 5], 4, 1001, V), V, "polynomial"),
    }


KINDS = sorted(hashes())


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(data=st.data())
def test_rows_are_the_references(kind: str, data: st.DataObject) -> None:
    hashing = hashes()[kind]
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    classes = data.draw(st.sampled_from([np.arange(V), classes_of(V, generator)]))
    pad = data.draw(st.integers(0, V - 1))
    end = data.draw(st.sampled_from([None, 0, 7]))
    hashing.bind(classes, pad, end)
    alphabet = st.sampled_from([0, 1, 2, 7, V - 1]) | st.integers(0, V - 1)
    rows = data.draw(st.lists(st.lists(alphabet, min_size=9, max_size=9), min_size=1, max_size=2))
    found = hashing(torch.tensor(rows))
    spelling = Spelling(classes.tolist(), int(classes[pad]), end)
    expected = [expected_rows(hashing, spelling, row) for row in rows]
    assert found.dtype == torch.int64
    assert found.transpose(0, 1).tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_not_bound_every_token_is_its_own_class_and_the_pad_is_token_0(kind: str) -> None:
    hashing = hashes()[kind]
    tokens = torch.randint(V, (1, 12))
    expected = expected_rows(hashing, Spelling(range(V), 0, None), tokens[0].tolist())
    assert not hashing.is_bound
    assert hashing(tokens)[:, 0].tolist() == expected


def test_the_wrapping_case_wraps() -> None:
    """The case above would prove nothing if its products fitted, or none were negative."""
    factors = hashes()["wraps around"].multipliers[0].tolist()
    products = [token * factor for token, factor in itertools.product(range(V), factors)]
    assert any(product >= 2**63 for product in products)
    assert any(as_int64(product) < 0 for product in products)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", [None, 7])
def test_a_continuation_has_the_rows_of_the_whole(kind: str, end: int | None) -> None:
    hashing = hashes()[kind]
    hashing.bind(classes_of(V, np.random.default_rng(0)), 3, end)
    tokens = torch.randint(V, (3, 20))
    tokens[0, 9], tokens[1, 10], tokens[2, 11] = 7, 7, 7
    whole, before = hashing(tokens), hashing.layout.longest - 1
    for cut in range(1, 20):
        past = torch.cat([torch.full((3, before), NOT_A_TOKEN), tokens[:, :cut]], 1)[:, -before:]
        assert torch.equal(hashing(tokens[:, cut:], past), whole[:, :, cut:])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_depend_on_the_last_tokens_of_their_own_sequence_alone(kind: str) -> None:
    hashing = hashes()[kind]
    tokens = torch.randint(V, (2, 16))
    rows, longest = hashing(tokens), hashing.layout.longest
    changed = tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % V
    differ = (hashing(changed) != rows).any(-1).any(0)  # [B, S]
    assert not differ[1].any()
    assert not differ[0, :8].any() and not differ[0, 8 + longest :].any()
    assert differ[0, 8]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hashing(tokens), rows)


def test_a_document_start_hides_what_is_before_it() -> None:
    hashing = hashes()["drawn"]
    hashing.bind(np.arange(V), 5, 7)
    document = torch.randint(8, V, (1, 6))
    alone = hashing(document)
    for before in (torch.randint(V, (1, 4)), torch.tensor([[7, 7, 7, 7]])):
        before[0, -1] = 7
        assert torch.equal(hashing(torch.cat([before, document], 1))[:, :, 4:], alone)


def test_the_end_of_a_document_itself_sees_its_document() -> None:
    hashing = hashes()["drawn"]
    hashing.bind(np.arange(V), 5, 7)
    one, other = torch.tensor([[10, 7]]), torch.tensor([[11, 7]])
    assert not torch.equal(hashing(one)[:, :, 1], hashing(other)[:, :, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_in_its_head(kind: str) -> None:
    hashing = hashes()[kind]
    layout = hashing.layout
    rows = hashing(torch.randint(V, (4, 500)))
    assert layout.rows_per_head % ROW_MULTIPLE == 0
    for table, moduli in enumerate(layout.moduli):
        for head, modulus in enumerate(moduli):
            mine = rows[table, ..., head] - head * layout.rows_per_head
            assert int(mine.min()) >= 0 and int(mine.max()) < modulus <= layout.rows_per_head


# Where it runs.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_it_compiles_whole(kind: str, backend: str) -> None:
    hashing = hashes()[kind]
    hashing.bind(classes_of(V, np.random.default_rng(1)), 3, 7)
    torch.compiler.reset()  # the cases together pass the limit of recompilations
    compiled = torch.compile(hashing, fullgraph=True, backend=backend, dynamic=False)
    tokens = torch.randint(V, (2, 11))
    history = torch.full((2, hashing.layout.longest - 1), NOT_A_TOKEN)
    assert torch.equal(compiled(tokens), hashing(tokens))
    assert torch.equal(compiled(tokens, history), hashing(tokens, history))


@pytest.mark.parametrize("kind", KINDS)
def test_it_exports_for_any_length(kind: str) -> None:
    hashing = hashes()[kind]
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(
        hashing, (torch.randint(V, (2, 11)),), dynamic_shapes={"tokens": {1: length}}
    )
    tokens = torch.randint(V, (2, 29))
    assert torch.equal(program.module()(tokens), hashing(tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_it_runs_without_values(kind: str) -> None:
    hashing = hashes()[kind]
    shape = hashing(torch.randint(V, (2, 11))).shape
    on_meta = hashing.to("meta")
    assert on_meta(torch.zeros(2, 11, dtype=torch.int64, device="meta")).shape == shape
    with FakeTensorMode():
        assert hashes()[kind](torch.zeros(2, 11, dtype=torch.int64)).shape == shape


@pytest.mark.parametrize("kind", KINDS)
def test_built_on_meta_it_hashes_as_built_on_the_cpu(kind: str) -> None:
    whole = hashes()[kind]
    with torch.device("meta"):
        later = hashes()[kind]
    for hashing in (whole, later):
        hashing.bind(classes_of(V, np.random.default_rng(1)), 3, 7)
    later.to_empty(device="cpu").reset_parameters()
    tokens = torch.randint(V, (2, 11))
    assert torch.equal(later(tokens), whole(tokens))


def test_a_state_dict_holds_all_that_the_rows_depend_on() -> None:
    for kind, hashing in hashes().items():
        hashing.bind(classes_of(V, np.random.default_rng(1)), 3, 7)
        other = hashes()[kind]
        other.load_state_dict(hashing.state_dict())
        assert other.is_bound
        tokens = torch.randint(V, (2, 11))
        assert torch.equal(other(tokens), hashing(tokens))


def test_another_tokenizer_is_refused_and_the_same_is_not() -> None:
    hashing = hashes()["drawn"]
    classes = classes_of(V, np.random.default_rng(1))
    hashing.bind(classes, 3, 7)
    hashing.bind(classes, 3, 7)
    for other in ((np.arange(V), 3, 7), (classes, 0, 7), (classes, 3, 8), (classes, 3, None)):
        with pytest.raises(UserError, match="bound to another tokenizer"):
            hashing.bind(*other)


def test_a_tokenizer_may_have_fewer_tokens_than_the_network_but_no_more() -> None:
    hashing = hashes()["drawn"]
    with pytest.raises(UserError, match=f"has {V + 1} ids but model.vocab_size={V}"):
        hashing.bind(np.arange(V + 1), 0, None)
    hashing.bind(np.arange(40), 4, None)
    assert hashing.classes[40:].tolist() == [4] * 10
    drawn = np.random.default_rng(10007).integers(0, (2**63 - 1) // 40 // 2, 3, dtype=np.int64)
    assert hashing.multipliers[0].tolist() == (2 * drawn + 1).tolist()


# Numbers that others have published, or that follow from what they have.


def golden_layout(base: int, layers: tuple[int, ...], orders: tuple[int, ...]) -> NgramLayout:
    return prime_layout(layers, orders, 8, base)


def test_v41_has_the_released_rows_and_its_multipliers() -> None:
    layout = golden_layout(16_000_000, (1, 14), (2, 3, 4))
    assert [layout.used_rows(table) for table in (0, 1)] == [384_006_168, 384_016_682]
    assert [moduli[0] for moduli in layout.moduli] == [16000057, 16000477]
    assert [moduli[-1] for moduli in layout.moduli] == [16000463, 16000889]
    hashing = NgramHash(layout, 99_092)
    assert hashing.multipliers.tolist() == [
        [76632096046245, 4839876093313, 35959672319349, 73987337458391],
        [67716810739261, 51510806800915, 30921347202721, 82619226485591],
    ]


def test_the_demo_has_its_primes() -> None:
    layout = golden_layout(5 * 129_280, (1, 15), (2, 3))
    assert layout.moduli[0][:3] == (646403, 646411, 646421)
    assert layout.moduli[-1][-1] == 646879
    assert [layout.used_rows(table) for table in (0, 1)] == [10_344_164, 10_348_242]


@pytest.mark.parametrize(
    ("base", "rows", "parameters"),
    [
        (2_262_400, 72_404_232, 5_792_338_560),  # Engram-27B
        (7_239_680, 231_678_892, 18_534_311_360),  # Engram-40B
    ],
)
def test_the_papers_models_have_their_parameters(base: int, rows: int, parameters: int) -> None:
    layout = golden_layout(base, (1, 14), (2, 3))
    assert sum(layout.used_rows(table) for table in (0, 1)) == rows
    assert rows * 80 == parameters


def test_qwen_has_its_primes() -> None:
    layout = golden_layout(20_000_000, (1,), (2, 3))
    ends = (3, 23, 33, 47, 59, 63, 69, 77, 81, 93, 107, 147, 153, 159, 161, 171)
    assert layout.moduli == (tuple(20_000_000 + end for end in ends),)
    assert layout.used_rows(0) == 320_001_446


@pytest.mark.parametrize(
    ("sizes", "num_heads"), [((24,), 5), ((90, 8), 4), ((8, 8, 8), 7), ((1000, 990, 900), 3)]
)
def test_primes_are_taken_once_and_in_turn(sizes: tuple[int, ...], num_heads: int) -> None:
    orders = range(2, 2 + len(sizes))
    layout = prime_layout([3, 1, 8], orders, num_heads, [max(s, 21) for s in sizes])
    expected = prime_sizes(3, [max(s, 21) for s in sizes], num_heads)
    assert [list(moduli) for moduli in layout.moduli] == expected
    flat = [modulus for moduli in layout.moduli for modulus in moduli]
    assert len(set(flat)) == len(flat) and all(map(is_prime, flat))


def test_over_encodings_heads_differ_by_two() -> None:
    layout = spaced_layout((2, 3), 4, 12_800_001, 129_280)
    assert layout.moduli == (tuple(12_800_001 + 2 * k for k in range(8)),)


def test_a_polynomial_hash_by_hand() -> None:
    """17 · 1 + 4 · 50 + 2 · 2500 = 5217, of orders 2 and 3."""
    hashing = NgramHash(spaced_layout((2, 3), 1, 103, V), V, "polynomial")
    rows = hashing(torch.tensor([[2, 4, 17]]))[0, 0, -1]
    assert rows.tolist() == [217 % 103, 128 + 5217 % 105]
