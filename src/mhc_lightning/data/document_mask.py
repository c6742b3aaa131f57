"""Tells a network to keep the documents of its sequences apart (`data.document_mask`)."""

from typing import Any

from torch import nn

from mhc_lightning.errors import UserError
from mhc_lightning.modules import Memory


def keep_documents_apart(network: nn.Module, end_of_document: int | None) -> None:
    """`Transformer.mask_documents`, for a network that may know of no documents.

    Args:
        network: The network.
        end_of_document: The token that ends a document; None to look at a sequence as a whole.

    Raises:
        UserError: The network cannot keep documents apart, or has a memory without a tokenizer.
    """
    memory = getattr(network, "memory", None)
    if end_of_document is not None and isinstance(memory, Memory) and not memory.is_bound:
        raise UserError(
            "data.document_mask=true keeps the n-grams of a memory inside documents, for which it"
            " needs the tokenizer of the data; name it with data.tokenizer=…"
        )
    mask = getattr(network, "mask_documents", None)
    if mask is not None:
        mask(end_of_document)
    elif end_of_document is not None:
        raise UserError(
            f"data.document_mask=true needs a network that can keep documents apart, and"
            f" {type(network).__name__} has no method mask_documents; use data.document_mask=false"
        )


def keeps_documents_apart(checkpoint: dict[str, Any]) -> bool:
    """True if the data of a loaded checkpoint had `document_mask`, or an exported model's had."""
    state = checkpoint.get("TextDataModule", {}).get("data", {})
    return bool(checkpoint.get("document_mask") or state.get("document_mask"))
