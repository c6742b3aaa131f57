"""The tokenizer of a pretrained model, and whether data were made with it.

Tokenizers are compared by content: files of the same tokenizer may differ, as a GGUF file and a
`tokenizer.json` do.
"""

from collections.abc import Sequence
from itertools import chain, repeat

import numpy as np

from mhc_lightning.data.prepared_data import PreparedData
from mhc_lightning.data.token_data.token_data import TokenData
from mhc_lightning.data.token_source import TokenSource
from mhc_lightning.data.tokenizer_sources import tokenizer_file
from mhc_lightning.data.tokenizers import JsonTokenizer, Tokenizer, load_tokenizer
from mhc_lightning.errors import UserError

# Words, numbers, code and characters that tokenizers cut differently.
_SAMPLE = (
    "The Quick brown fox's 12,345.67 isn't naïve: don't!\n\n"
    "def f(x_1):\n\tif x_1 >= 2:\n        return {'a': [x_1, 0x1F]}  # done\n"
    "Größe für Straße, 日本語の文 и кириллица 🎉  é"
)


def tokenizer_of_model(pretrained: str) -> Tokenizer | None:
    """The tokenizer of a pretrained model; None if there is none beside it.

    Args:
        pretrained: A folder, a name on the hub or a GGUF file, as `PretrainedNetwork` takes it.

    Raises:
        UserError: It cannot be read.
    """
    file = tokenizer_file(pretrained)
    return load_tokenizer(file) if file.is_file() else None


def match_model(sources: Sequence[TokenSource], pretrained: str) -> None:
    """Refuse data of another tokenizer than a pretrained model's.

    Token data made elsewhere that nobody named a tokenizer for are taken to be of the model's.

    Args:
        sources: The opened data.
        pretrained: See `tokenizer_of_model`.

    Raises:
        UserError: Names the first token that differs; or ids of token data are not the model's.
    """
    from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # `inspect` needs none

    own = tokenizer_of_model(pretrained)
    if own is None:
        rank_zero_warn(
            f"there is no tokenizer beside {pretrained}, so that it is not checked whether the data"
            " were made with the model's"
        )
        return
    for data in sources:
        if data.tokenizer is None and isinstance(data, TokenData):
            data.name_tokenizer(own)
        elif data.tokenizer is not None:
            _compare(data, data.tokenizer, own, pretrained)


def _compare(data: TokenSource, made_with: Tokenizer, own: Tokenizer, pretrained: str) -> None:
    if made_with.fingerprint == own.fingerprint:
        return
    another = difference(made_with, own)
    if another:
        how = (
            f"prepare them again with prepare.tokenizer={pretrained}"
            if isinstance(data, PreparedData)
            else "name the one that made them with data.tokenizer=…, or tokenize the text again"
        )
        raise UserError(
            f"the tokens of {data.path} were made with another tokenizer than that of"
            f" {pretrained}: {another}; {how}"
        )
    from lightning.pytorch.utilities.rank_zero import rank_zero_warn

    if made_with.beginning != own.beginning:
        rank_zero_warn(
            f"documents of {data.path} begin with {_begins(made_with)}, and {pretrained} expects"
            f" {_begins(own)}; prepare.begin_of_document says which"
        )
    if not np.array_equal(made_with.encode(_SAMPLE), own.encode(_SAMPLE)):
        rank_zero_warn(
            f"the tokenizer of {data.path} has the tokens of {pretrained}, but cuts texts into them"
            " in another way"
        )


def difference(one: Tokenizer, other: Tokenizer) -> str:
    """The first id of `one` that stands for another token in `other`, in words; empty if none.

    `other` may have more tokens.
    """
    # The text of a part of a character does not tell it from others.
    by_name = isinstance(one, JsonTokenizer) and isinstance(other, JsonTokenizer)
    theirs = chain(other.vocabulary(), repeat(("", "nothing")))
    for token, (a, b) in enumerate(zip(one.vocabulary(), theirs, strict=False)):
        ends = token == one.end_of_document == other.end_of_document
        unused = a[1].startswith("<unused ")
        if not (ends or unused) and (a[0] != b[0] or (by_name and a[1] != b[1])):
            return f"{token} is {a[1]!r} there and {b[1]!r} for the model"
    return ""


def _begins(tokenizer: Tokenizer) -> str:
    token = getattr(tokenizer, "begin_of_document_token", "")
    return repr(token) if token else "no token of their own"
