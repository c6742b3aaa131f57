"""Text in, batches of tokens out: tokenizers, `prepare`, and the Lightning data module."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mhc_lightning.data.preparation import PrepareSummary, prepare
    from mhc_lightning.data.prepared_data import PreparedData
    from mhc_lightning.data.text_data_module import TextDataModule
    from mhc_lightning.data.tokenizers import ByteTokenizer, JsonTokenizer, load_tokenizer

__all__ = [
    "ByteTokenizer",
    "JsonTokenizer",
    "PrepareSummary",
    "PreparedData",
    "TextDataModule",
    "load_tokenizer",
    "prepare",
]

# Loaded at first use: tokenizers need neither torch nor Lightning, the data module needs both.
_HOMES = {
    "ByteTokenizer": "tokenizers",
    "JsonTokenizer": "tokenizers",
    "PrepareSummary": "preparation",
    "PreparedData": "prepared_data",
    "TextDataModule": "text_data_module",
    "load_tokenizer": "tokenizers",
    "prepare": "preparation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
