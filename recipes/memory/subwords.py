"""The standard library as sub-words: n-grams of bytes repeat too often to need a memory."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from commands import run
from library_text import prepare_library, prepare_words
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mhc_lightning.data import PreparedData

VOCABULARY = 2048
_BYTES, _FOLDER = Path("data/python"), Path("data/python_subwords")
_TOKENIZER = Path("data/python_subwords_tokenizer/tokenizer.json")
_END = "<|endoftext|>"


def prepare_subwords(config: str, overrides: Iterable[str]) -> None:
    """Prepare it as ``data/python_subwords``, unless another text is set.

    The tokenizer learns from the training text alone: the bytes that other recipes train on.

    Raises:
        SystemExit: It failed.
    """
    overrides = list(overrides)
    if any(word.startswith("data.path=") for word in overrides):
        return
    prepare_library(config, overrides)
    _TOKENIZER.parent.mkdir(parents=True, exist_ok=True)
    learn(documents(_BYTES), VOCABULARY).save(str(_TOKENIZER))
    run(*prepare_words(config, str(_FOLDER)), f"tokenizer={_TOKENIZER}")


def documents(folder: Path) -> Iterator[str]:
    """The documents of the training part of a folder that `prepare` wrote from bytes."""
    data = PreparedData(str(folder))
    end = data.tokenizer.end_of_document
    for chunk in data.chunks("train"):
        tokens = np.asarray(data.tokens(chunk), np.int64)
        for document in np.split(tokens, np.flatnonzero(tokens == end)):
            yield document[document != end].astype(np.uint8).tobytes().decode(errors="replace")


def learn(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Byte-pair encoding of a text, with a token that ends documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
