"""A memory and its tokenizer in plain Python: bound in any order, refused where they differ."""

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from networks import DENSE, MEMORIES, tiny_transformer
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from mhc_lightning import LanguageModel
from mhc_lightning.checkpoints.saved_memory import memory_in
from mhc_lightning.data.token_classes import bind_tokenizer, token_classes
from mhc_lightning.data.tokenizers import ByteTokenizer
from mhc_lightning.errors import UserError
from mhc_lightning.optimizers.recipes import AdamWRecipe
from mhc_lightning.strategies import FullyShardedStrategy

WITHOUT = "the memory has no tokenizer"


class Merged(ByteTokenizer):
    """A tokenizer of the same ids whose tokens look alike in another way."""

    def vocabulary(self) -> Iterator[tuple[str, str]]:
        for text, entry in super().vocabulary():
            yield ("q" if text == "p" else text), entry


class Data(pl.LightningDataModule):
    """Tokens, with or without what made them."""

    def __init__(self, tokenizer: Any = None) -> None:
        super().__init__()
        if tokenizer is not None:
            self.tokenizer = tokenizer

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        return DataLoader(torch.randint(0, 257, (16, 9), generator=generator), batch_size=4)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return self.train_dataloader()


def module(memory: str = "engram", meta: bool = False, **changes: Any) -> LanguageModel:
    with torch.device("meta" if meta else "cpu"):
        built = partial(MEMORIES[memory], **changes)
        network = tiny_transformer(vocab_size=257, memory=built, num_streams=2, **DENSE)
    return LanguageModel(network, AdamWRecipe(lr=1e-2, warmup_steps=0))


def trainer(steps: int = 2, **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "max_steps": steps,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "limit_val_batches": 0,
        "log_every_n_steps": 1,
        **options,
    }
    return pl.Trainer(**settings)


def fitted(path: Path, tokenizer: Any = None, **changes: Any) -> LanguageModel:
    """A model that was trained, and whose checkpoint is at `path`."""
    made = module(**changes)
    runner = trainer()
    runner.fit(made, datamodule=Data(tokenizer))
    runner.save_checkpoint(path)
    return made


def is_bound_to_bytes(model: LanguageModel) -> bool:
    (hashing,) = [memory_in(model.model).hash]
    assert hashing is not None
    return bool(
        hashing.classes.tolist() == token_classes(ByteTokenizer().vocabulary()).tolist()
        and int(hashing.document_end) == 256
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of a model with Engram that was trained on bytes."""
    assert is_bound_to_bytes(fitted(tmp_path / "bytes.ckpt", ByteTokenizer()))
    return tmp_path / "bytes.ckpt"


def test_the_data_bring_the_tokenizer(saved: Path) -> None:
    """Before or after the weights, and by hand, too."""
    for tokenizer in (ByteTokenizer(), None):
        resumed = module()
        trainer(4).fit(resumed, datamodule=Data(tokenizer), ckpt_path=saved, weights_only=False)
        assert is_bound_to_bytes(resumed), "the checkpoint holds it, if the data do not"
        validated = module()
        runner = trainer(limit_val_batches=1)
        runner.validate(
            validated, Data(tokenizer), ckpt_path=saved, verbose=False, weights_only=False
        )
        assert is_bound_to_bytes(validated)
    loaded = module()
    bind_tokenizer(loaded.model.memory, ByteTokenizer())
    loaded.load_state_dict(torch.load(saved, weights_only=False)["state_dict"])
    bind_tokenizer(loaded.model.memory, ByteTokenizer())


def test_another_tokenizer_is_refused_before_and_after_the_weights(saved: Path) -> None:
    with pytest.raises(UserError, match=r"another tokenizer, with \d+ of 257 tokens"):
        trainer(4).fit(module(), datamodule=Data(Merged()), ckpt_path=saved, weights_only=False)
    loaded = module()
    loaded.start_from(torch.load(saved, weights_only=False)["state_dict"])
    with pytest.raises(UserError, match="the memory is bound to another tokenizer"):
        trainer().fit(loaded, datamodule=Data(Merged()))
    bound = module()
    bind_tokenizer(bound.model.memory, Merged())
    before = {name: tensor.clone() for name, tensor in bound.state_dict().items()}
    with pytest.raises(UserError, match="the memory of the weights to begin with"):
        bound.start_from(torch.load(saved, weights_only=False)["state_dict"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in bound.state_dict().items())


def test_another_layout_is_refused_by_the_trainer(saved: Path) -> None:
    changed = {r"memory\.seed=3": module(seed=3), r"memory\.rows=\[31, 41\]": module(rows=37)}
    for said, model in changed.items():
        with pytest.raises(UserError, match=f"the memory of the checkpoint.*{said}"):
            trainer(4).fit(model, datamodule=Data(), ckpt_path=saved, weights_only=False)


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_network_on_meta_is_bound_and_checked(memory: str, tmp_path: Path) -> None:
    weights = fitted(tmp_path / "x.ckpt", ByteTokenizer(), memory=memory).state_dict()
    later = module(memory, meta=True)
    later.start_from(weights)
    runner = trainer(1, strategy=FullyShardedStrategy(), limit_val_batches=1)
    runner.validate(later, Data(ByteTokenizer()), verbose=False)
    assert is_bound_to_bytes(later) or memory == "over_encoding"
    for name, tensor in later.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(whole, weights[name]), name
    later = module(memory, meta=True)
    later.start_from(weights)
    if memory != "over_encoding":  # which hashes no tokens alike
        with pytest.raises(UserError, match="another tokenizer, with"):
            trainer(1, strategy=FullyShardedStrategy()).fit(later, datamodule=Data(Merged()))


def test_without_a_tokenizer_it_works_uncompressed_says_so_once_and_stays_so(
    tmp_path: Path,
) -> None:
    with pytest.warns(UserWarning, match=WITHOUT) as caught:
        alone = fitted(tmp_path / "alone.ckpt")
    assert sum(WITHOUT in str(warning.message) for warning in caught) == 1
    hashing = alone.model.memory.hash
    assert hashing.classes.tolist() == list(range(257)) and int(hashing.document_end) == -1
    resumed = module()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=WITHOUT)
        trainer(4).fit(
            resumed, datamodule=Data(), ckpt_path=tmp_path / "alone.ckpt", weights_only=False
        )
    with pytest.raises(UserError, match=r"memory\.compress=False \(not True\)"):
        trainer(4).fit(
            module(),
            datamodule=Data(ByteTokenizer()),
            ckpt_path=tmp_path / "alone.ckpt",
            weights_only=False,
        )


def test_a_tokenizer_of_another_kind_is_not_asked(tmp_path: Path) -> None:
    """A data module of the user's own may keep any object under this name."""
    with pytest.warns(UserWarning, match=WITHOUT):
        fitted(tmp_path / "own.ckpt", tokenizer=object())


def test_an_average_of_the_constants_is_refused() -> None:
    for averages, steps in ((True, 0), (False, 2)):
        callback = EMAWeightAveraging(use_buffers=averages, decay=0.5)
        runner = trainer(callbacks=[callback])
        model = module()
        if averages:
            with pytest.raises(UserError, match=r"EMAWeightAveraging averages buffers.*False"):
                runner.fit(model, datamodule=Data(ByteTokenizer()))
        else:
            runner.fit(model, datamodule=Data(ByteTokenizer()))
            assert is_bound_to_bytes(model)
        assert runner.global_step == steps


def test_a_network_that_knows_of_no_memory_has_none() -> None:
    assert memory_in(torch.nn.Linear(2, 2)).is_bound
