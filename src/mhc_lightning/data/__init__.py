"""Text prepared as chunks of tokens, and chunks read as batches.

`prepare` turns files into chunks of tokens, by these modules in turn: `input_files` (with
`file_formats`, `text_files`, `input_urls`; or `hub_datasets`), `work_units` (of `text_parts`,
`table_parts`, `archive_parts`; by the readers in `formats/`), `stream_documents` and `documents`
(with `record_text`), `unit_tokenization` (with `tokenizers`, `text_cuts`, `chunk_writing`; in the
processes of `worker_pool`), `prepared_writing`, `prepared_record`.

`TextDataModule` turns chunks into batches: `sources`, `prepared_data` (with `chunk_cache` for a
URL) or `token_data` for data made elsewhere, both a `token_source`; `training_sequences` (with
`shuffling`) or `validation_sequences`, `sequence_reader`, `chunk_file`; `batch_loader` starts
at the position that `resume` restores.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mhc_lightning.data.preparation import prepare
    from mhc_lightning.data.prepare_summary import PrepareSummary
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
    "PrepareSummary": "prepare_summary",
    "PreparedData": "prepared_data",
    "TextDataModule": "text_data_module",
    "load_tokenizer": "tokenizers",
    "prepare": "preparation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
