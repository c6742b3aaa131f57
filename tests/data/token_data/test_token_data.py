"""Token data in the data module: splits, ids, tokenizers, mixtures, ranks, workers and resume."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import token_files as write
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from mhc_lightning import TextDataModule
from mhc_lightning.data import ByteTokenizer, PreparedData
from mhc_lightning.data.sources import Source, open_sources
from mhc_lightning.data.token_data import token_data
from mhc_lightning.data.token_data.token_data import TokenData
from mhc_lightning.errors import UserError

DOCUMENTS = write.documents(200, vocab=250)
TOKENS = np.concatenate(DOCUMENTS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write.write_megatron(tmp_path / "data/a", DOCUMENTS).parent


def module(path: Any, **options: Any) -> TextDataModule:
    sizes = {"batch_size": 4, "micro_batch_size": 2, "sequence_length": 64}
    return TextDataModule(path, **{**sizes, **options})


def opened(path: Path, fraction: float = 0.0) -> TokenData:
    (data,), _ = open_sources([Source(str(path))], 16, validation_fraction=fraction)
    assert isinstance(data, TokenData)
    return data


class Losses(L.LightningModule):
    """The smallest model; remembers what it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(257, 257)
        self.batches: list[Tensor] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.batches.append(batch.clone())
        logits = self.table(batch[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def validation_step(self, batch: Tensor, index: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: TextDataModule, steps: int, checkpoint: Path | None = None, **options: Any) -> Losses:
    model = Losses()
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        accumulate_grad_batches=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **options},
    )
    trainer.fit(model, datamodule=data, ckpt_path=checkpoint)
    return model


def save(path: Path, every: int) -> dict[str, Any]:
    callback = ModelCheckpoint(path, every_n_train_steps=every, save_top_k=-1)
    return {"enable_checkpointing": True, "callbacks": [callback]}


def test_a_share_of_each_span_is_held_out(folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(token_data, "_SPAN_TOKENS", 5000)
    data = opened(folder, 0.1)
    assert len(data.chunks("train")) == len(data.chunks("validation")) == -(-len(TOKENS) // 5000)
    pieces = zip(data.chunks("train"), data.chunks("validation"), strict=True)
    tokens = [data.open_chunk(span).read(0, span.tokens) for pair in pieces for span in pair]
    assert np.concatenate(tokens).tolist() == TOKENS.tolist()
    assert data.num_tokens("validation") == sum(
        round(0.1 * min(5000, len(TOKENS) - start)) for start in range(0, len(TOKENS), 5000)
    )
    assert data.content != opened(folder, 0.2).content != opened(folder).content


def test_each_token_of_an_epoch_comes_once(folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(token_data, "_SPAN_TOKENS", 5000)
    sequences = module(str(folder), validation_fraction=0).training_sequences
    length = sequences.orders[0].length
    rows = sequences.__getitems__(range(length)).numpy()
    expected = [
        TOKENS[start + i * 64 : start + i * 64 + 65].tolist()
        for start in range(0, len(TOKENS), 5000)
        for i in range((min(5000, len(TOKENS) - start) - 1) // 64)
    ]
    assert sorted(rows.tolist()) == sorted(expected) and rows.tolist() != expected


def test_the_order_is_that_of_a_prepared_folder(prepared_path: Path, tmp_path: Path) -> None:
    """The same chunks as litdata made them give the same batches, without the record."""
    (tmp_path / "bare").mkdir()
    for split in ("train", "validation"):
        os.symlink(prepared_path / split, tmp_path / "bare" / split)
    for one, other in zip(
        _batches(module(prepared_path), range(3)),
        _batches(module(tmp_path / "bare"), range(3)),
        strict=True,
    ):
        assert torch.equal(one, other)
    bare = opened(tmp_path / "bare")
    prepared = PreparedData(prepared_path)
    for split in ("train", "validation"):
        spans, chunks = bare.chunks(split), prepared.chunks(split)
        assert [span.tokens for span in spans] == [chunk.tokens for chunk in chunks]


def _batches(data: TextDataModule, positions: range) -> list[Tensor]:
    return [data.training_sequences[position] for position in positions]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_exactly_within_an_epoch(folder: Path, tmp_path: Path, workers: int) -> None:
    whole = fit(module(folder, num_workers=workers), 6)
    fit(module(folder), 3, **save(tmp_path / "saved", 3))
    (checkpoint,) = (tmp_path / "saved").glob("*.ckpt")
    rest = fit(module(folder, num_workers=workers), 6, checkpoint)
    assert len(rest.batches) == 6
    for one, other in zip(whole.batches[6:], rest.batches, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(whole.table.weight, rest.table.weight)


def test_other_data_are_refused_at_resume(folder: Path, tmp_path: Path) -> None:
    fit(module(folder), 1, **save(tmp_path / "saved", 1))
    (checkpoint,) = (tmp_path / "saved").glob("*.ckpt")
    moved = tmp_path / "moved"
    folder.rename(moved)
    fit(module(moved), 2, checkpoint)
    with pytest.raises(UserError, match="trained on other data"):
        fit(module(moved, validation_fraction=0.2), 2, checkpoint)
    changed = TOKENS.copy()
    changed[77] += 1
    write.write_raw(moved / "a.bin", changed)
    with pytest.raises(UserError, match="trained on other data"):
        fit(module(moved), 2, checkpoint)
    fit(module(moved, allow_data_change=True), 2, checkpoint)


def test_ranks_share_a_step(folder: Path) -> None:
    from mhc_lightning.strategies.layout import Layout

    def batch(rank: int, ranks: int) -> Tensor:
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        if ranks > 1:
            strategy.layout = lambda: Layout(ranks, rank)
        data = module(folder, micro_batch_size=4 // ranks)
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            strategy=strategy, global_step=0, max_steps=3, accumulate_grad_batches=1
        )
        return next(iter(data.train_dataloader()))

    assert torch.equal(torch.cat([batch(0, 2), batch(1, 2)]), batch(0, 1))


def test_nothing_is_written_beside_the_data(folder: Path) -> None:
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    fit(module(folder), 1)
    folder.chmod(0o755)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_ids_are_checked_when_opened_and_when_read(folder: Path, monkeypatch: Any) -> None:
    data = module(folder)
    data.validate_against(257)
    with pytest.raises(UserError, match=r"has the id 249, and model\.vocab_size=249; set it"):
        data.validate_against(249)
    monkeypatch.setattr(token_data, "_SAMPLES", 1)
    monkeypatch.setattr(token_data, "_SAMPLE_TOKENS", 100)
    tokens = TOKENS.copy()
    tokens[5003] = 300
    write.write_raw(folder / "a.bin", tokens)
    data = module(folder, validation_fraction=0)
    data.validate_against(257)
    with pytest.raises(UserError, match=r"a\.bin has the id 300 \(token 5003\), and model\.vocab"):
        data.training_sequences.__getitems__(range(data.training_sequences.orders[0].length))


def test_negative_ids_are_refused(tmp_path: Path) -> None:
    tokens = TOKENS.copy()
    tokens[9] = -100
    write.write_megatron(tmp_path / "a", [tokens], dtype="i4")
    with pytest.raises(UserError, match=r"has the id -100 \(token 9\)"):
        module(tmp_path / "a").setup("fit")


def test_a_model_that_is_fitted_in_python_is_checked_too(folder: Path) -> None:
    class Small(Losses):
        model = SimpleNamespace(vocab_size=200)

    trainer = L.Trainer(max_steps=1, accelerator="cpu", logger=False, accumulate_grad_batches=2)
    with pytest.raises(UserError, match=r"has the id 249, and model\.vocab_size=200"):
        trainer.fit(Small(), datamodule=module(folder))


def test_a_file_that_changes_in_a_run_ends_it(folder: Path) -> None:
    data = module(folder)
    assert len(data.training_sequences[0]) == 65
    os.utime(folder / "a.bin", (1, 1))
    with pytest.raises(UserError, match=r"a\.bin was changed since the run began"):
        data.training_sequences[1]
    (folder / "a.bin").unlink()
    with pytest.raises(UserError, match=r"a\.bin cannot be read: No such file"):
        data.sources[0].open_chunk(data.sources[0].chunks("train")[0])


def test_tokenizers(folder: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    alone = module(folder)
    assert alone.tokenizer is None and alone.end_of_document == 0
    assert alone._identity()["tokenizer"] is None
    named = module(folder, tokenizer="bytes")
    assert isinstance(named.tokenizer, ByteTokenizer) and named.end_of_document == 256
    with pytest.raises(UserError, match=r"the tokenizer of .* has 257 ids but model\.vocab_size"):
        named.validate_against(256)
    wide = write.write_raw(tmp_path / "wide.bin", TOKENS + 100)
    with pytest.raises(UserError, match=r"has the id 349, and the tokenizer 'bytes' has 257 ids"):
        module(wide, tokenizer="bytes").setup("fit")
    assert module(wide).end_of_document is None
    assert module(wide, end_of_document=100).end_of_document == 100
    with pytest.raises(UserError, match=r"data\.end_of_document=7, and the documents of .* with 0"):
        module(folder, end_of_document=7).setup("fit")


def test_documents_are_kept_apart_without_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    assert module(folder, document_mask=True).document_boundary == 0
    raw = write.write_raw(tmp_path / "raw.bin", TOKENS)
    with pytest.raises(UserError, match=r"name it with data\.end_of_document=…"):
        module(raw, document_mask=True).setup("fit")
    masked = module(raw, document_mask=True, end_of_document=0)
    assert masked.document_boundary == 0
    other = module(raw, document_mask=True, end_of_document=1)
    with pytest.raises(UserError, match="end_of_document was 0 and is 1"):
        other.load_state_dict(masked.state_dict())


def test_a_mask_that_changes_in_a_run_ends_it(tmp_path: Path) -> None:
    path = write.write_datatrove(tmp_path / "a.ds", DOCUMENTS)
    loss = tmp_path / "a.ds.loss"
    loss.write_bytes(b"\1" * len(TOKENS))
    data = module(path)
    assert len(data.training_sequences[0]) == 65
    os.utime(loss, (1, 1))
    with pytest.raises(UserError, match="was changed since the run began"):
        data.training_sequences[1]


def test_mixtures(folder: Path, prepared_path: Path, tmp_path: Path, tokenizer_file: Path) -> None:
    raw = write.write_raw(tmp_path / "raw.bin", TOKENS)
    sources = [
        {"path": str(folder), "weight": 1},
        {"path": str(prepared_path), "weight": 2},
        {"path": str(raw), "weight": 1},
    ]
    with pytest.raises(UserError, match=r"does not say which tokenizer .* data\.tokenizer=…"):
        module(sources).setup("fit")
    with pytest.raises(UserError, match="prepared with another tokenizer"):
        module(sources, tokenizer=str(tokenizer_file)).setup("fit")
    data = module(sources, tokenizer="bytes")
    assert data.training_sequences.mixture.drawn(10_000) == [2500, 5000, 2500]
    assert len(fit(data, 2).batches) == 4
    by_tokens = module([str(folder), str(raw)])
    assert by_tokens.weights == [data.num_tokens("train") for data in by_tokens.sources]
    counts = [len(data.chunks("validation")) for data in module(sources, tokenizer="bytes").sources]
    assert all(counts)


def test_without_held_out_tokens(folder: Path) -> None:
    data = module(folder, validation_fraction=0.0)
    with pytest.warns(UserWarning, match=r"no validation: .*larger data\.validation_fraction"):
        fit(data, 1, limit_val_batches=1.0)
    with pytest.raises(UserError, match=r"data\.validation_fraction is 1"):
        module(folder, validation_fraction=1)
