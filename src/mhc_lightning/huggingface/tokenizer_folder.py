"""The tokenizer of a model as transformers' `AutoTokenizer` reads it."""

import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers

from mhc_lightning.data.tokenizer_files import (
    CHAT_TEMPLATE_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    companions_of,
)
from mhc_lightning.data.tokenizers import ByteTokenizer, JsonTokenizer, Tokenizer
from mhc_lightning.errors import UserError
from mhc_lightning.interchange.exported_model import TRAINING_TOKENIZER

END_OF_BYTES = "<|endofdocument|>"
# With these the ids of a text would be others than in training.
_LEFT_OUT = ("post_processor", "truncation", "padding")


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, which give a text the ids of training.

    The token that ends documents is also the padding, and `bos_token` where documents begin with no
    token of their own; one of their own is put before each text. A chat template beside the
    tokenizer's file comes along.

    A `tokenizer.json` that adds other tokens to every text, cuts it or leaves out merges at random
    is written without that; `training_tokenizer/` then holds the file as it was.

    Args:
        tokenizer: A `ByteTokenizer` or `JsonTokenizer`.
        folder: An existing folder.

    Raises:
        UserError: The tokenizer is of another class.
    """
    settings: dict[str, Any] = {}
    if isinstance(tokenizer, ByteTokenizer):
        byte_level_tokenizer().save(str(folder / TOKENIZER_FILE))
        begin = end = END_OF_BYTES
    elif isinstance(tokenizer, JsonTokenizer):
        settings = _write_json(tokenizer, folder)
        end = tokenizer.end_of_document_token
        begin = tokenizer.begin_of_document_token or end
    else:
        raise UserError(
            f"a {type(tokenizer).__name__} has no form that transformers reads; export without"
            " form=huggingface"
        )
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin,
        "eos_token": end,
        "pad_token": end,
        "padding_side": "left",  # as `generate` needs it; training works with either
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    _write(folder / TOKENIZER_CONFIG_FILE, settings)


def copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> bool:
    """Copy the files of a tokenizer of transformers, as they are, if it is one.

    Args:
        tokenizer: Any tokenizer.
        folder: An existing folder.

    Returns:
        False, and nothing is copied, if there is no `tokenizer_config.json` beside its file.
    """
    if not isinstance(tokenizer, JsonTokenizer):
        return False
    if not tokenizer.path.with_name(TOKENIZER_CONFIG_FILE).is_file():
        return False
    shutil.copyfile(tokenizer.path, folder / TOKENIZER_FILE)
    for file in companions_of(tokenizer.path):
        shutil.copyfile(file, folder / file.name)
    return True


def byte_level_tokenizer() -> tokenizers.Tokenizer:
    """The tokenizer of `ByteTokenizer`'s ids: UTF-8 bytes, and 256 for `<|endofdocument|>`."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_BYTES])
    return tokenizer


def _byte_characters() -> list[str]:
    """The characters that stand for bytes in byte-level tokenizers, as GPT-2's code has them."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (chr(256 + number) for number in range(256))
    return [chr(byte) if byte in shown else next(others) for byte in range(256)]


def _write_json(tokenizer: JsonTokenizer, folder: Path) -> dict[str, Any]:
    """Write a `tokenizer.json`; the entries of its `tokenizer_config.json` that are kept."""
    path = tokenizer.path
    content = json.loads(path.read_text(encoding="utf-8"))
    plain = {**content, **dict.fromkeys(_LEFT_OUT), "post_processor": _puts_before(tokenizer)}
    plain["model"] = {**content["model"], "dropout": None}
    adds = any(content.get(name) != plain[name] for name in _LEFT_OUT)
    if adds or content["model"].get("dropout"):
        _write(folder / TOKENIZER_FILE, plain)
        (folder / TRAINING_TOKENIZER).mkdir()
        shutil.copyfile(path, folder / TRAINING_TOKENIZER / TOKENIZER_FILE)
    else:
        shutil.copyfile(path, folder / TOKENIZER_FILE)
    if path.with_name(CHAT_TEMPLATE_FILE).is_file():
        shutil.copyfile(path.with_name(CHAT_TEMPLATE_FILE), folder / CHAT_TEMPLATE_FILE)
    try:
        beside = json.loads(path.with_name(TOKENIZER_CONFIG_FILE).read_text(encoding="utf-8"))
        return {k: beside[k] for k in ("chat_template", "unk_token") if k in beside}
    except (OSError, ValueError, TypeError):  # it may be missing, and is not needed
        return {}


def _puts_before(tokenizer: JsonTokenizer) -> dict[str, Any] | None:
    """The step of a `tokenizer.json` that puts the token before texts that documents begin with."""
    begin = tokenizer.begin_of_document_token
    if not begin:
        return None
    first: dict[str, Any] = {"SpecialToken": {"id": begin, "type_id": 0}}
    text, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, second],
        "special_tokens": {begin: {"id": begin, "ids": tokenizer.beginning, "tokens": [begin]}},
    }


def _write(file: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")
