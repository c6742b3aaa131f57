"""Tokens that are read and not predicted, such as those of a prompt, in files and in batches.

In a file such a token has its highest bit set (of 32), so that it stays beside the others in one
chunk with one checksum. In a batch it is the negative number -101 - id, below the -100 of padding:
a batch stays int64 [B, S + 1].
"""

import numpy as np
import torch
from torch import Tensor

from mhc_lightning.data.chunk_file import ChunkFile
from mhc_lightning.kernels import IGNORE_INDEX

STORED_DTYPE = np.dtype(np.uint32)
_FLAG = np.uint32(1 << 31)
_FIRST = IGNORE_INDEX - 1  # what stands for token 0


def stored(tokens: np.ndarray, is_target: bool) -> np.ndarray:
    """Tokens as a file holds them, uint32."""
    tokens = tokens.astype(STORED_DTYPE)
    return tokens if is_target else tokens | _FLAG


def stored_ids(tokens: np.ndarray) -> np.ndarray:
    """The tokens of a file, without what says whether they are predicted."""
    return tokens & ~_FLAG


class ContextChunkFile(ChunkFile):
    """A chunk some of whose tokens are not predicted; see `ChunkFile`."""

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens as a batch holds them, int64; see `ChunkFile`."""
        tokens = super().read(start, count)
        return as_context(stored_ids(tokens), (tokens & _FLAG) != 0)


def as_context(tokens: np.ndarray, is_context: np.ndarray) -> np.ndarray:
    """Tokens as a batch holds them, int64; those of `is_context` are not predicted."""
    ids = tokens.astype(np.int64)
    return np.where(is_context, _FIRST - ids, ids)


def ids_of(values: np.ndarray) -> np.ndarray:
    """The tokens of an array as a batch holds them, without padding."""
    return values if values.dtype.kind == "u" else np.where(values < 0, _FIRST - values, values)


def tokens_of(batch: Tensor) -> Tensor:
    """The tokens of a batch; padding stays `IGNORE_INDEX`."""
    return torch.where(batch < IGNORE_INDEX, _FIRST - batch, batch)


def targets_of(batch: Tensor) -> Tensor:
    """The tokens of a batch, `IGNORE_INDEX` in place of those that are not predicted."""
    return batch.clamp(min=IGNORE_INDEX)
