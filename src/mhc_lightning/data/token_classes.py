"""Classes of tokens that differ in case, accents or spaces only, for memories of n-grams."""

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from tokenizers import Regex, normalizers

from mhc_lightning.data.tokenizers import Tokenizer
from mhc_lightning.modules import Memory

_PARTIAL = "\ufffd"
_LONE_SPACE = "\ue000"  # keeps a token that is a space alone from being stripped to nothing

# As the released code of arXiv 2601.07372 has it.
_NORMALIZE = normalizers.Sequence(
    [
        normalizers.NFKC(),
        normalizers.NFD(),
        normalizers.StripAccents(),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
        normalizers.Replace(Regex(r"^ $"), _LONE_SPACE),
        normalizers.Strip(),
        normalizers.Replace(_LONE_SPACE, " "),
    ]
)


def token_classes(tokens: Iterable[tuple[str, str]]) -> np.ndarray:
    """The class of each token, int64 [V], numbered in the order of first appearance.

    Args:
        tokens: (text of the token alone, its entry in the vocabulary), by id. The entry stands for
            a token of an incomplete character.
    """
    numbers: dict[str, int] = {}
    classes = []
    for text, entry in tokens:
        key = entry if _PARTIAL in text else _NORMALIZE.normalize_str(text) or text
        classes.append(numbers.setdefault(key, len(numbers)))
    return np.array(classes, dtype=np.int64)


def bind_tokenizer(memory: Memory, tokenizer: Tokenizer) -> None:
    """Tell a network's memory which tokens its tokenizer gives.

    Raises:
        UserError: The tokenizer has more tokens than the network, or the memory is bound to
            another one.
    """
    if memory.hash is not None:
        memory.bind(_classes_of(tokenizer), tokenizer.end_of_document)


@lru_cache(maxsize=1)  # commands bind one tokenizer several times
def _classes_of(tokenizer: Tokenizer) -> np.ndarray:
    return token_classes(tokenizer.vocabulary())
