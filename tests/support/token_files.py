"""Token files as other programs write them, from their published layouts."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

MEGATRON_CODES = {"u1": 1, "i1": 2, "i2": 3, "i4": 4, "i8": 5, "f8": 6, "f4": 7, "u2": 8}


def documents(count: int = 40, vocab: int = 1000, end: int = 0, seed: int = 0) -> list[np.ndarray]:
    """Random documents, which end with `end`."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(20, 200, count)
    return [np.append(generator.integers(1, vocab, length), end) for length in lengths]


def write_raw(path: Path, tokens: np.ndarray, dtype: str = "<u2") -> Path:
    """NanoGPT's: `np.array(ids, dtype=np.uint16).tofile(path)`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tokens.astype(dtype).tofile(path)
    return path


def write_llm_c(
    path: Path, tokens: np.ndarray, magic: int = 20240520, version: int = 1, dtype: str = "<u2"
) -> Path:
    """That of llm.c: 256 int32 and the tokens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack("<256i", magic, version, len(tokens), *[0] * 253)
    path.write_bytes(header + tokens.astype(dtype).tobytes())
    return path


def write_megatron(
    prefix: Path,
    sequences: Sequence[np.ndarray],
    borders: Sequence[int] | None = None,
    dtype: str = "u2",
    modes: bool = False,
) -> Path:
    """The `.bin` and `.idx` of Megatron-LM; by default each sequence is a document."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    borders = range(len(sequences) + 1) if borders is None else borders
    itemsize, pointer = np.dtype(dtype).itemsize, 0
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", MEGATRON_CODES[dtype])
    index += struct.pack("<QQ", len(sequences), len(borders))
    pointers = []
    for sequence in sequences:
        index += struct.pack("<i", len(sequence))
        pointers.append(pointer)
        pointer += len(sequence) * itemsize
    index += b"".join(struct.pack("<q", each) for each in [*pointers, *borders])
    index += bytes(len(sequences)) if modes else b""
    Path(f"{prefix}.idx").write_bytes(index)
    Path(f"{prefix}.bin").write_bytes(b"".join(s.astype(f"<{dtype}").tobytes() for s in sequences))
    return prefix


def write_datatrove(
    path: Path, texts: Sequence[np.ndarray], width: int = 2, index: bool = True
) -> Path:
    """The `.ds` of datatrove, with its `.index` and `.metadata`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tokens = np.concatenate(texts)
    path.write_bytes(tokens.astype(f"<u{width}").tobytes())
    ends = np.cumsum([len(text) for text in texts])
    if index:
        path.with_name(f"{path.name}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    metadata = f"gpt2|{width}\n{len(tokens)}\n{len(tokens)} T"
    path.with_name(f"{path.name}.metadata").write_text(metadata)
    return path


def write_litdata(folder: Path, chunks: Sequence[np.ndarray], dtype: str = "<u2") -> Path:
    """The chunks and the index of litdata, one item in each chunk."""
    import json

    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, tokens in enumerate(chunks):
        body = tokens.astype(dtype).tobytes()
        data = struct.pack("<3I", 1, 12, 12 + len(body)) + body
        name = f"chunk-0-{number}.bin"
        (folder / name).write_bytes(data)
        entries.append(
            {"chunk_bytes": len(data), "chunk_size": 1, "dim": len(tokens), "filename": name}
        )
    number = {"<u2": 5, "<i4": 2, "<i8": 3}[dtype]
    config = {"compression": None, "data_format": [f"no_header_numpy:{number}"]}
    (folder / "index.json").write_text(json.dumps({"chunks": entries, "config": config}))
    return folder
