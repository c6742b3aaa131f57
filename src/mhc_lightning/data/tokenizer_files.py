"""A `tokenizer.json` and the `tokenizer_config.json` beside it, read and checked."""

import json
import warnings
from itertools import takewhile
from pathlib import Path
from typing import Any

from mhc_lightning.errors import UserError

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
# What belongs to a tokenizer beside its file, in folders of transformers.
_COMPANION_FILES = (TOKENIZER_CONFIG_FILE, "special_tokens_map.json", CHAT_TEMPLATE_FILE)

_RARE_CHARACTERS = "\ua66e\U0001242b"  # letters that hardly any vocabulary has

# Names under which published tokenizers keep the token that ends a document.
_END_OF_DOCUMENT_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end▁of▁sentence|>",
    "<｜end▁of▁sentence｜>",
    "<|endofdocument|>",
    "</s>",
    "<eos>",
    "[EOS]",
    "<|im_end|>",
)


def read_tokenizer(path: Path) -> tuple[Any, bytes, int | None]:
    """A tokenizer that encodes all text, always the same way, and finds no special tokens in it.

    Truncation, padding and BPE dropout, which a file may ask for, are switched off.

    Args:
        path: The `tokenizer.json`.

    Returns:
        The `tokenizers.Tokenizer`, the content of the file, and the id for text which the tokenizer
        does not know, if it has one.

    Raises:
        UserError: The file is missing or is no tokenizer.
    """
    import tokenizers

    if not path.is_file():
        raise UserError(
            f"tokenizer file {path} does not exist; give a tokenizer.json, a folder that has one, a"
            " name on the Hugging Face hub, a GGUF file, or `bytes`"
        )
    content = path.read_bytes()
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:
        raise UserError(
            f"{path} is not a tokenizer of the `tokenizers` library: {error}"
        ) from error
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if isinstance(tokenizer.model, tokenizers.models.BPE):
        tokenizer.model.dropout = None
    described = json.loads(content)
    _warn_of_other_ids(path, tokenizer, described)
    _warn_of_lost_text(path, tokenizer)
    return tokenizer, content, _unknown(tokenizer, described["model"])


def _warn_of_other_ids(path: Path, tokenizer: Any, content: dict[str, Any]) -> None:
    """Warn if the library silently numbers added tokens differently from the file."""
    others = [
        f"{token['content']!r} is {tokenizer.token_to_id(token['content'])}, not {token['id']}"
        for token in content.get("added_tokens") or []
        if tokenizer.token_to_id(token["content"]) != token["id"]
    ]
    if others:
        more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
        warnings.warn(
            f"{path} has gaps in its ids, which the `tokenizers` library closes: {others[0]}{more};"
            " weights that were trained with the file's ids do not fit",
            stacklevel=4,
        )


def _warn_of_lost_text(path: Path, tokenizer: Any) -> None:
    """Warn if the tokenizer drops characters that it does not know."""
    try:
        lost = not tokenizer.encode(_RARE_CHARACTERS, add_special_tokens=False).ids
    except Exception:  # the tokenizer refuses unknown characters
        return
    if lost:
        warnings.warn(
            f"{path} leaves out characters that it does not know, without an id in their place:"
            " text gets lost unless its vocabulary has all of them",
            stacklevel=4,
        )


def _unknown(tokenizer: Any, model: dict[str, Any]) -> int | None:
    """The id for unknown text, if there is one."""
    token = model.get("unk_token")
    unknown: int | None = model.get("unk_id") if token is None else tokenizer.token_to_id(token)
    return unknown


def companions_of(path: Path) -> list[Path]:
    """The files that belong to a `tokenizer.json`, as far as they are beside it."""
    beside = [path.with_name(name) for name in _COMPANION_FILES]
    return [file for file in beside if file.is_file()]


def begin_of_document_token(path: Path, tokenizer: Any) -> str:
    """The token that a tokenizer puts before each text; empty if it puts none.

    Args:
        path: The `tokenizer.json`, for the error message.
        tokenizer: The `tokenizers.Tokenizer`.

    Raises:
        UserError: It puts several tokens there.
    """
    encoding = _of_known_text(tokenizer)
    if encoding is None:
        return ""
    added = zip(encoding.tokens, encoding.special_tokens_mask, strict=True)
    before = [token for token, _ in takewhile(lambda pair: pair[1], added)]
    if len(before) > 1:
        raise UserError(
            f"{path} puts several tokens before each text ({', '.join(before)}), and a document"
            " begins with one at most; name it with begin_of_document=…, or '' for none"
        )
    return str(before[0]) if before else ""


def _of_known_text(tokenizer: Any) -> Any:
    """The encoding of a text that a tokenizer knows; None if none of a few is known.

    What precedes a text cannot be told from the rest where all of it is special.
    """
    for text in ("a", "e", "1", " "):
        try:
            encoding = tokenizer.encode(text)
        except Exception:  # it refuses unknown characters
            continue
        if not all(encoding.special_tokens_mask):
            return encoding
    return None


def end_of_document_token(path: Path, vocabulary: dict[str, int]) -> str:
    """The `eos_token` of a `tokenizer_config.json`, else the first usual name that is known.

    Args:
        path: The `tokenizer.json`, beside which a `tokenizer_config.json` may be.
        vocabulary: The tokens and their ids.

    Raises:
        UserError: There is no such token, or the `tokenizer_config.json` cannot be understood.
    """
    config = path.with_name(TOKENIZER_CONFIG_FILE)
    if config.is_file():
        try:
            token = json.loads(config.read_bytes()).get("eos_token")
            token = token.get("content") if isinstance(token, dict) else token
            known = token in vocabulary
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(
                f"{config} cannot be understood ({error}); fix or remove it,"
                " or name the token that ends documents with end_of_document=…"
            ) from error
        if known:
            return str(token)
    for name in _END_OF_DOCUMENT_NAMES:
        if name in vocabulary:
            return name
    raise UserError(
        f"{path} has no end-of-document token under a usual name;"
        " name one of its tokens with end_of_document=…"
    )
