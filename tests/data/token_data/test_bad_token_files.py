"""Files that are damaged, of another kind or do not belong together are refused in one line."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import token_files as write

from mhc_lightning.data.sources import Source, open_sources
from mhc_lightning.errors import UserError

DOCUMENTS = write.documents(8)
TOKENS = np.concatenate(DOCUMENTS)


def refuse(path: Path, message: str, sequence_length: int = 16) -> None:
    with pytest.raises(UserError, match=message) as raised:
        open_sources([Source(str(path))], sequence_length)
    assert "\n" not in str(raised.value)


def cut(path: Path, count: int) -> Path:
    path.write_bytes(path.read_bytes()[:-count])
    return path


def change(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


def test_bin(tmp_path: Path) -> None:
    raw = write.write_raw(tmp_path / "raw.bin", TOKENS)
    refuse(cut(raw, 1), r"raw\.bin has \d+ bytes, an odd number")
    (tmp_path / "empty.bin").write_bytes(b"")
    refuse(tmp_path / "empty.bin", "is empty")
    llm = write.write_llm_c(tmp_path / "llm.bin", TOKENS)
    refuse(cut(llm, 2), rf"has {len(TOKENS) - 1} tokens, and its header says {len(TOKENS)}")
    refuse(write.write_llm_c(llm, TOKENS, 20240521), "but the magic number 20240521")
    refuse(write.write_llm_c(llm, TOKENS, 20240522), "but the magic number 20240522")
    refuse(write.write_llm_c(llm, TOKENS, version=2), "has version 2 of llm.c's format; version 1")
    refuse(write.write_llm_c(llm, TOKENS[:0]), "holds no tokens")
    (tmp_path / "model.bin").write_bytes(b"PK\x03\x04" + bytes(100))
    refuse(tmp_path / "model.bin", "no file of tokens but a zip archive or a PyTorch checkpoint")
    refuse(write.write_raw(tmp_path / "short.bin", TOKENS[:10]), "sequence_length=16 is longer")


def bad_borders(prefix: Path) -> None:
    write.write_megatron(prefix, DOCUMENTS, [0, 5, 3, 8])


def bad_pointer(prefix: Path) -> None:
    change(Path(f"{prefix}.idx"), 34 + 4 * 8 + 8, struct.pack("<q", 2))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: cut(Path(f"{p}.bin"), 2), r"lists \d+ bytes of tokens, and a\.bin has"),
        (lambda p: write.write_raw(Path(f"{p}.bin"), TOKENS[:-9]), "belongs to other data"),
        (lambda p: cut(Path(f"{p}.idx"), 8), r"a\.idx has \d+ bytes and needs \d+ for its 8"),
        (lambda p: Path(f"{p}.idx").write_bytes(b"MMIDIDX\0\0\1"), "cut short within its header"),
        (lambda p: change(Path(f"{p}.idx"), 0, b"TNTIDX"), "does not begin with MMIDIDX"),
        (lambda p: change(Path(f"{p}.idx"), 9, b"\2"), "has version 2 of Megatron-LM's format"),
        (lambda p: change(Path(f"{p}.idx"), 17, b"\7"), r"of type 7 \(float32\)"),
        (lambda p: change(Path(f"{p}.idx"), 17, b"\x63"), r"of type 99 \(unknown\)"),
        (lambda p: Path(f"{p}.bin").unlink(), r"a\.idx has no a\.bin beside it"),
        (bad_borders, "documents that do not divide its 8 sequences"),
        (bad_pointer, "sequences that do not follow each other"),
        (lambda p: write.write_megatron(p, []), "is empty"),
    ],
)
def test_megatron(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(write.write_megatron(tmp_path / "data/a", DOCUMENTS))
    refuse(tmp_path / "data", message)


def test_datatrove(tmp_path: Path) -> None:
    path = write.write_datatrove(tmp_path / "a.ds", DOCUMENTS)
    refuse(cut(path, 2), r"a\.ds has \d+ bytes, which are not the \d+ tokens of 2 or 4 bytes")
    write.write_datatrove(path, DOCUMENTS)
    index = tmp_path / "a.ds.index"
    refuse_copy = index.read_bytes()
    index.write_bytes(refuse_copy[:-3])
    refuse(path, "no multiple of 8")
    index.write_bytes(refuse_copy[8:16] + refuse_copy[:8] + refuse_copy[16:])
    refuse(path, "documents that end before they begin")


def spoil_index(folder: Path, **config: object) -> None:
    index = json.loads((folder / "index.json").read_text())
    index["config"] |= config
    (folder / "index.json").write_text(json.dumps(index))


def test_litdata(tmp_path: Path) -> None:
    folder = write.write_litdata(tmp_path / "a", DOCUMENTS[:2])
    cut(folder / "chunk-0-1.bin", 2)
    refuse(folder, r"chunk-0-1\.bin has \d+ bytes, not the \d+ of its")
    (folder / "chunk-0-1.bin").unlink()
    refuse(folder, r"names chunk-0-1\.bin, which is missing")
    for config, message in (
        ({"compression": "zstd"}, r"compressed \(zstd\)"),
        ({"encryption": {"algorithm": "fernet"}}, "encrypted chunks"),
        ({"data_format": ["str"]}, "litdata items of str, not tokens"),
        ({"data_format": ["no_header_numpy:9"]}, "not tokens"),
        ({"data_format": ["no_header_numpy:5", "int"]}, "not tokens"),
        ({"data_format": None}, "cannot be understood"),
    ):
        spoil_index(write.write_litdata(folder, DOCUMENTS[:2]), **config)
        refuse(folder, message)


def test_datasets(tmp_path: Path) -> None:
    import pyarrow as pa

    def save(column: object, name: str = "input_ids", options: object = None) -> Path:
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        (tmp_path / "a").mkdir()
        table = pa.table({name: column})
        with pa.ipc.new_stream(
            str(tmp_path / "a/data.arrow"), table.schema, options=options
        ) as writer:
            writer.write_table(table)
        (tmp_path / "a/state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
        return tmp_path / "a"

    rows = [text.tolist() for text in DOCUMENTS]
    refuse(save([str(row) for row in rows]), "holds string, not lists of whole numbers")
    refuse(save([[0.5]]), "not lists of whole numbers")
    refuse(save(["a"], "text"), r"has no column input_ids but text; tokenize .* `prepare`")
    refuse(save([*rows, None]), "rows without input_ids")
    refuse(save([[1, None]]), "rows without input_ids")
    compressed = pa.ipc.IpcWriteOptions(compression="zstd")
    refuse(save(rows * 9, options=compressed), "is compressed")
    refuse(save(pa.array([], pa.list_(pa.int32()))), "no tokens to train on")
    folder = save(rows)
    cut(folder / "data.arrow", 200)
    refuse(folder, r"data\.arrow cannot be read \(.*\); copy the folder again")
    (folder / "data.arrow").unlink()
    refuse(folder, "is missing, though state.json names it")


def test_folders(tmp_path: Path) -> None:
    write.write_raw(tmp_path / "two/a.bin", TOKENS)
    write.write_datatrove(tmp_path / "two/b.ds", DOCUMENTS)
    refuse(tmp_path / "two", r"several formats: .*a\.bin \(nanoGPT \.bin\) and .*b\.ds \(datatrove")
    write.write_megatron(tmp_path / "types/a", DOCUMENTS, dtype="u2")
    write.write_megatron(tmp_path / "types/b", DOCUMENTS, dtype="i4")
    refuse(tmp_path / "types", "tokens of type uint16 and .* of type int32")
    write.write_raw(tmp_path / "held/val.bin", TOKENS)
    write.write_raw(tmp_path / "held/test.bin", TOKENS)
    refuse(tmp_path / "held", "no files to train on: by their names")
    (tmp_path / "parquet").mkdir()
    (tmp_path / "parquet/a.parquet").write_bytes(b"PAR1")
    refuse(
        tmp_path / "parquet", r"holds Parquet files.*prepare input=.*/parquet output=.*save_to_disk"
    )
    (tmp_path / "nothing").mkdir()
    refuse(tmp_path / "nothing", "is not a prepared folder")
    refuse(tmp_path / "absent", "does not exist")
