"""Batches, their division among ranks, and the refusals of the data module."""

import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from omegaconf import OmegaConf

from mhc_lightning import TextDataModule
from mhc_lightning.data import ByteTokenizer, PreparedData, prepare
from mhc_lightning.errors import UserError
from mhc_lightning.strategies.layout import Layout


def module(path: Any, **options: Any) -> TextDataModule:
    sizes = {"batch_size": 4, "micro_batch_size": 2, "sequence_length": 64}
    return TextDataModule(path, **{**sizes, **options})


def fake_trainer(
    rank: int = 0, world_size: int = 1, accumulation: int = 2, **options: Any
) -> SimpleNamespace:
    """As much of a trainer as a data module looks at; the layout is the strategy's to say."""
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    if world_size > 1:
        strategy.layout = lambda: Layout(world_size, rank)
    return SimpleNamespace(
        **{
            "strategy": strategy,
            "global_step": 0,
            "max_steps": 10,
            "accumulate_grad_batches": accumulation,
            "world_size": 8,  # more than the data-parallel ranks, as with pipeline stages
            "state": SimpleNamespace(fn=TrainerFn.FITTING),
            **options,
        }
    )


def attached(path: Any, trainer: SimpleNamespace | None = None, **options: Any) -> TextDataModule:
    data = module(path, **options)
    data.trainer = trainer or fake_trainer()  # type: ignore[assignment]
    return data


def test_batches_and_tokenizer(prepared_path: Path) -> None:
    data = attached(prepared_path)
    data.setup("fit")
    loader = data.train_dataloader()
    assert len(loader) == 20
    batch = next(iter(loader))
    assert batch.shape == (2, 65) and batch.dtype == torch.int64
    assert isinstance(data.tokenizer, ByteTokenizer) and data.end_of_document == 256
    assert set(batch.unique().tolist()) <= set(range(257))


def test_data_parallel_ranks_share_a_step(prepared_path: Path) -> None:
    alone = attached(prepared_path)
    step = torch.cat(list(alone.train_dataloader())[:2])
    pair = [
        next(iter(attached(prepared_path, fake_trainer(rank, 2, 1)).train_dataloader()))
        for rank in range(2)
    ]
    assert torch.equal(torch.cat(pair), step)


def test_validation_is_the_same_on_any_number_of_ranks(prepared_path: Path) -> None:
    def rows(rank: int, world_size: int) -> list[bytes]:
        data = attached(prepared_path, fake_trainer(rank, world_size), validation_sequences=16)
        return [row.numpy().tobytes() for batch in data.val_dataloader() for row in batch]

    alone = rows(0, 1)
    assert len(set(alone)) == 16
    assert rows(0, 1) == alone
    assert sorted(rows(0, 2) + rows(1, 2)) == sorted(alone)
    padding = torch.full((65,), -100).numpy().tobytes()
    three = [row for rank in range(3) for row in rows(rank, 3)]
    assert len(three) == 18
    assert sorted(row for row in three if row != padding) == sorted(alone)


@pytest.mark.parametrize("limit", [1, 2, 0.5])
def test_a_limit_in_batches_is_warned_of(prepared_path: Path, limit: float) -> None:
    def load(limit: float) -> None:
        attached(prepared_path, fake_trainer(limit_val_batches=limit)).val_dataloader()

    with pytest.warns(UserWarning, match=r"limit_val_batches=.* data.validation_sequences=N"):
        load(limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(1.0)
        load(0)


def test_one_sequence_on_three_ranks_is_padding_on_two(prepared_path: Path) -> None:
    batches = [
        list(
            attached(prepared_path, fake_trainer(rank, 3), validation_sequences=1).val_dataloader()
        )
        for rank in range(3)
    ]
    assert [[batch.shape for batch in rank] for rank in batches] == 3 * [[(1, 65)]]
    assert [bool((rank[0] == -100).all()) for rank in batches] == [False, True, True]


def test_all_held_out_text_can_be_used(prepared_path: Path, prepared: PreparedData) -> None:
    data = attached(prepared_path, validation_sequences=None)
    tokens = sum(chunk.tokens for chunk in prepared.chunks("validation"))
    predicted = sum(int((batch[:, 1:] != -100).sum()) for batch in data.val_dataloader())
    assert predicted == tokens - len(prepared.chunks("validation"))
    assert data.validation_bytes_per_token == prepared.bytes_per_token()


def test_without_held_out_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    prepare(tmp_path / "a.txt", tmp_path / "out", validation_fraction=0.0, progress=False)
    data = attached(tmp_path / "out")
    with pytest.warns(UserWarning, match=r"no validation: .*larger validation_fraction"):
        assert data.val_dataloader() == []
    assert math.isnan(data.validation_bytes_per_token)
    data.trainer.state.fn = TrainerFn.VALIDATING
    with pytest.raises(UserError, match="no held-out text"):
        data.val_dataloader()


def test_the_end_of_the_data_is_said_once(prepared_path: Path) -> None:
    data = attached(prepared_path, fake_trainer(max_steps=10**6), sequence_length=1024)
    total = data.training_sequences.orders[0].length
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _, _batch in zip(range(total // 2), data.train_dataloader(), strict=False):
            pass
        assert not [w for w in caught if "every sequence" in str(w.message)]
        for _, _batch in zip(range(3 * total), data.train_dataloader(), strict=False):
            pass
    said = [str(w.message) for w in caught if "every sequence" in str(w.message)]
    assert len(said) == 1
    assert said[0].endswith("every sequence has been seen 1 time; going on in a new order")


def test_a_mixture_is_drawn_by_weight(prepared_path: Path, other_prepared_path: Path) -> None:
    paths = [
        {"path": str(prepared_path), "weight": 3},
        {"path": str(other_prepared_path), "weight": 1},
    ]
    data = attached(paths)
    drawn = data.training_sequences.mixture.drawn(10_000)
    assert drawn == [7500, 2500]
    assert next(iter(data.train_dataloader())).shape == (2, 65)
    assert 0.99 < data.validation_bytes_per_token < 1.0


def test_a_url_is_streamed_with_workers(prepared_path: Path, tmp_path: Path) -> None:
    far = attached(f"local:{prepared_path}", cache_dir=str(tmp_path), num_workers=2)
    near = attached(prepared_path)
    for one, other in zip(far.train_dataloader(), near.train_dataloader(), strict=True):
        assert torch.equal(one, other)
    far.teardown("fit")
    assert list(tmp_path.rglob("*.bin"))


def test_the_model_must_know_every_token(prepared_path: Path) -> None:
    data = module(prepared_path)
    data.validate_against(257)
    data.validate_against(300)
    with pytest.raises(
        UserError, match=r"has 257 ids but model\.vocab_size=256; set it to 257 or more"
    ):
        data.validate_against(256)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"data\.batch_size is 0"),
        ({"micro_batch_size": -1}, r"data\.micro_batch_size is -1"),
        ({"sequence_length": 0}, r"data\.sequence_length is 0"),
        ({"num_workers": -1}, r"data\.num_workers is -1"),
        ({"batch_size": 5}, r"batch_size=5 is not a multiple of data\.micro_batch_size=2;"),
    ],
)
def test_wrong_sizes_are_refused_at_once(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        module("anywhere", **options)


def test_sizes_that_do_not_fit_the_ranks(prepared_path: Path) -> None:
    data = attached(prepared_path, fake_trainer(0, 3))
    with pytest.raises(UserError, match="micro_batch_size=2 times 3 ranks"):
        data.setup("fit")
    data = attached(prepared_path, fake_trainer(accumulation=1))
    with pytest.raises(UserError, match=r"accumulate_grad_batches=1\) does not match.* takes 2"):
        data.train_dataloader()


def test_bad_data_show_at_setup(tmp_path: Path, prepared_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; make it with `prepare"):
        attached(tmp_path / "absent").setup("fit")
    with pytest.raises(UserError, match="is longer than the chunks"):
        attached(prepared_path, sequence_length=10**6).setup("fit")


def test_hyper_parameters_are_plain_and_without_keys_of_the_store(prepared_path: Path) -> None:
    path = OmegaConf.create([{"path": str(prepared_path), "weight": 2.0}])
    data = TextDataModule(path, 4, 2, 16, storage_options={"key": "secret"})
    assert data.hparams["path"] == [{"path": str(prepared_path), "weight": 2.0}]
    assert type(data.hparams["path"]) is list and data.hparams["sequence_length"] == 16
    assert "secret" not in str(data.hparams)
    again = TextDataModule(**data.hparams)
    assert again.hparams == data.hparams and again.weights == data.weights
