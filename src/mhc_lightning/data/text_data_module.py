"""The Lightning data module: batches of tokens, resumed exactly."""

import math
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from mhc_lightning.checkpoints.folder_index import RUN, is_checkpoint_folder
from mhc_lightning.data.batch_loader import BatchLoader, TrainingLoader
from mhc_lightning.data.data_sizes import check_sizes
from mhc_lightning.data.held_out_loader import held_out_loader
from mhc_lightning.data.model_tokenizer import match_model
from mhc_lightning.data.prepared_data import PreparedData
from mhc_lightning.data.resume import StreamPosition, check_same_stream, stream_identity
from mhc_lightning.data.sources import (
    end_of_document,
    limit_ids,
    open_sources,
    parse_sources,
)
from mhc_lightning.data.token_source import TokenSource
from mhc_lightning.data.tokenizers import Tokenizer
from mhc_lightning.data.training_sequences import TrainingSequences
from mhc_lightning.data.validation_sequences import (
    ValidationSequences,
    validation_counts,
)
from mhc_lightning.errors import UserError
from mhc_lightning.modules.construction import plain
from mhc_lightning.strategies.layout import Layout, layout_of


class TextDataModule(L.LightningDataModule):
    """Training and validation batches, int64 [micro_batch_size, sequence_length + 1].

    Training is one endless stream of sequences whose order depends on the seed alone. The sequences
    of an optimizer step follow from the number of sequences consumed before it. So a resumed run
    continues exactly where it stopped, on any number of ranks and workers, even with another batch
    size. At the end of the data another pass begins, in a new order.

    With `Trainer(max_steps=…)` an epoch of Lightning is the whole run; without it an epoch is one
    pass over the data.

    Validation is a fixed choice of held-out sequences. Each sequence comes once, on one rank, for
    any `micro_batch_size` and number of ranks. Batches are padded to equal sizes on every rank.
    Short sequences at the ends of chunks are padded to the whole length. Padding is -100
    (`mhc_lightning.kernels.IGNORE_INDEX`), which is not predicted. Of the held-out text only the
    first token of each chunk file is left out, and with `document_mask` that of each document.
    A loss of l nats per token is `l / ln 2 / validation_bytes_per_token` bits per byte.

    Args:
        path: A folder that `prepare` wrote, the object-store URL of one, or token data made
            elsewhere (see `mhc_lightning.data.token_data`); a list of these, or of
            `{path, weight}`, to mix several (by default in proportion to their tokens).
        batch_size: Sequences per optimizer step, over all ranks and accumulated batches.
        micro_batch_size: Sequences per forward pass on one rank; None for a rank's whole share of
            the batch, which Lightning's batch-size finder then scales by `batch_size`.
        sequence_length: Tokens to predict per sequence.
        num_workers: Processes that read batches ahead. 0 reads in the main process, which takes
            microseconds per sequence unless the disk is slow. Chunks of a URL are fetched in the
            background in both cases.
        seed: Identifies the order of the training stream.
        validation_sequences: Held-out sequences per validation, evenly spaced; None for all of
            them.
        validation_fraction: Share to hold out of token data made elsewhere, of which no file is
            for validation by its name.
        tokenizer: If given, the tokenizer that the data must have been prepared with, or that token
            data were made with.
        end_of_document: Id of the token that ends documents, if nothing else says it: neither a
            tokenizer nor the token data.
        shuffle_window: Chunks among which sequences are shuffled.
        cache_dir: Folder for copies of a URL's chunks; by default `$MHC_LIGHTNING_CACHE` or
            `~/.cache/mhc_lightning`.
        storage_options: Options of the object store's client.
        document_mask: Keep the documents of a sequence apart: attention stays inside a document,
            positions restart, and the first token of each is not predicted (`LanguageModel` has
            its network do so: `Transformer.mask_documents`).
        allow_data_change: Resume although the checkpoint was trained on other data or in another
            order; the stream continues at the same number of sequences.

    Raises:
        UserError: Sizes do not fit together (more checks follow when the data are opened).
    """

    def __init__(
        self,
        path: Any,
        batch_size: int,
        micro_batch_size: int | None,
        sequence_length: int,
        num_workers: int = 0,
        seed: int = 0,
        validation_sequences: int | None = 256,
        validation_fraction: float = 0.01,
        tokenizer: str | None = None,
        end_of_document: int | None = None,
        shuffle_window: int = 8,
        cache_dir: str | None = None,
        storage_options: dict[str, Any] | None = None,
        document_mask: bool = False,
        allow_data_change: bool = False,
    ) -> None:
        super().__init__()
        path = plain(path)  # hyper-parameters that any program can read
        self.save_hyperparameters(ignore=["storage_options"])  # which may hold keys of the store
        check_sizes(
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            sequence_length=sequence_length,
            shuffle_window=shuffle_window,
            num_workers=num_workers,
            validation_sequences=validation_sequences,
            validation_fraction=validation_fraction,
        )
        self._position = StreamPosition(batch_size)
        self._micro_batch_size = micro_batch_size
        self.sequence_length = sequence_length
        self.num_workers = num_workers
        self.seed = seed
        self.validation_sequences = validation_sequences
        self.shuffle_window = shuffle_window
        self.document_mask = document_mask
        self.allow_data_change = allow_data_change
        self._sources = parse_sources(path)
        self._open_options = (tokenizer, cache_dir, storage_options, validation_fraction)
        self._end_of_document = end_of_document
        self._training_loader: TrainingLoader | None = None
        self.accumulation(1)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """The data module of a checkpoint, a file or a folder, as Lightning gives it.

        `storage_options` are not in a checkpoint: pass them again.
        """
        if isinstance(checkpoint_path, str | Path) and is_checkpoint_folder(Path(checkpoint_path)):
            checkpoint_path = Path(checkpoint_path) / RUN
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    # The data.

    @cached_property
    def _opened(self) -> tuple[list[TokenSource], list[float]]:
        opened = open_sources(self._sources, self.sequence_length, *self._open_options)
        for data in opened[0]:
            if isinstance(data, PreparedData) and data.unchecked:
                rank_zero_warn(data.unchecked)
        return opened

    @property
    def sources(self) -> list[TokenSource]:
        """The opened data."""
        return self._opened[0]

    @property
    def weights(self) -> list[float]:
        """Relative frequency of each source in training."""
        return self._opened[1]

    @cached_property
    def training_sequences(self) -> TrainingSequences:
        """The training stream; `training_sequences[position]` is int64 [sequence_length + 1]."""
        return TrainingSequences(
            self.sources, self.weights, self.sequence_length, self.seed, self.shuffle_window
        )

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the tokens; None for token data, as long as nobody names it."""
        return self.sources[0].tokenizer

    @property
    def end_of_document(self) -> int | None:
        """Id of the token that ends each document; None if nothing says it.

        Raises:
            UserError: The argument differs from what the tokenizer or the data say.
        """
        return end_of_document(self.sources, self._end_of_document)

    @property
    def document_boundary(self) -> int | None:
        """The token that ends documents which are kept apart; None without `document_mask`.

        Raises:
            UserError: The tokens have none.
        """
        if not self.document_mask:
            return None
        end = self.end_of_document
        if end is None:
            raise UserError(
                "data.document_mask=true needs a token that ends documents, and the tokens of"
                f" {self.sources[0].path} have none that is known; name it with"
                " data.end_of_document=…, or use data.document_mask=false"
            )
        return end

    @property
    def validation_bytes_per_token(self) -> float:
        """Bytes of text per token in validation; NaN without a validation split.

        With `document_mask` the first tokens of documents, which are not predicted, count as any.
        """
        counts = self._validation_sequences().num_tokens
        if not sum(counts):
            return math.nan
        pairs = zip(counts, self.sources, strict=True)
        return sum(n * data.bytes_per_token() for n, data in pairs if n) / sum(counts)

    def validate_against(self, vocab_size: int, pretrained: str | None = None) -> None:
        """Check that a model has a row for every token; ids of token data also as they are read.

        Args:
            vocab_size: The ids of the model.
            pretrained: The pretrained model that it is made from, see `PretrainedNetwork`. Token
                data are then of its tokenizer, if they do not say theirs.

        Raises:
            UserError: The tokenizer has more ids than the model, token data have an id that the
                model does not, or the tokenizer is another than the pretrained model's.
        """
        if pretrained is not None:
            match_model(self.sources, pretrained)
        limit_ids(self.sources, vocab_size, pretrained)

    # Division among ranks and micro-batches.

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per optimizer step on each of `world_size` data-parallel ranks.

        Raises:
            UserError: The batch cannot be divided evenly.
        """
        micro = self._micro_batch_size
        if micro is None:
            self._share(world_size)
            return 1
        count, rest = divmod(self.batch_size, micro * world_size)
        if rest:
            ranks = f" times {world_size} ranks" if world_size > 1 else ""
            raise UserError(
                f"data.batch_size={self.batch_size} is not a multiple of"
                f" data.micro_batch_size={micro}{ranks}; change one of them"
            )
        return count

    @property
    def batch_size(self) -> int:
        """Sequences per optimizer step, over all ranks."""
        return self._position.batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        self._position.batch_size = value

    @property
    def micro_batch_size(self) -> int:
        """Sequences per forward pass on one rank."""
        return self._micro_batch_size or self._share(self._data_parallel()[1])

    def _share(self, world_size: int) -> int:
        size, rest = divmod(self.batch_size, world_size)
        if rest or not size:
            raise UserError(
                f"data.batch_size={self.batch_size} cannot be shared evenly by {world_size}"
                f" devices; use a multiple of {world_size}"
            )
        return size

    def _data_parallel(self) -> tuple[int, int]:
        """The data-parallel rank of this process, and the number of data-parallel ranks."""
        layout = Layout() if self.trainer is None else layout_of(self.trainer.strategy)
        return layout.data_parallel_rank, layout.data_parallel_size

    @property
    def consumed_sequences(self) -> int:
        """Training sequences that the completed optimizer steps consumed, over all ranks."""
        return self._position.sequences(self.trainer)

    # Hooks of Lightning.

    def setup(self, stage: str) -> None:
        """Open the data, so that errors show before training begins, and start at step 0."""
        self._position.reset()  # Lightning restores a checkpoint after this
        if stage == "fit":
            self.accumulation(self._data_parallel()[1])
        assert self.sources
        network = getattr(getattr(self.trainer, "lightning_module", None), "model", None)
        if isinstance(vocab_size := getattr(network, "vocab_size", None), int):
            self.validate_against(vocab_size, getattr(network, "pretrained", None))
        _ = self.end_of_document, self.document_boundary

    def train_dataloader(self) -> TrainingLoader:
        """Training batches from the current position of the stream; see `TrainingLoader`."""
        assert self.trainer is not None
        rank, world_size = self._data_parallel()
        accumulation = self.accumulation(world_size)
        for callback in getattr(self.trainer, "callbacks", ()):
            if isinstance(callback, GradientAccumulationScheduler):
                raise UserError(
                    "GradientAccumulationScheduler changes the number of accumulated batches during"
                    " a run, but TextDataModule takes data.batch_size sequences for every step;"
                    " leave the callback out, or train on a loader of your own"
                )
        if self.trainer.accumulate_grad_batches != accumulation:
            raise UserError(
                f"Trainer(accumulate_grad_batches={self.trainer.accumulate_grad_batches}) does not"
                f" match: data.batch_size={self.batch_size} in micro-batches of"
                f" {self.micro_batch_size} on {world_size} ranks takes {accumulation}"
            )
        self._position.align(self.trainer, accumulation)
        steps = self.trainer.max_steps
        if steps < 0:
            sequences = sum(order.length for order in self.training_sequences.orders)
            steps = max(1, sequences // self.batch_size)
        if self._training_loader is not None:  # the trainer reloads it with every epoch
            self._training_loader.close()
        self._training_loader = TrainingLoader(
            self.training_sequences,
            steps * accumulation,
            position=self._position,
            trainer=self.trainer,
            accumulation=accumulation,
            micro_batch_size=self.micro_batch_size,
            rank=rank,
            world_size=world_size,
            repeats=getattr(self.trainer, "overfit_batches", 0) > 0,
            num_workers=self.num_workers,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )
        return self._training_loader

    def val_dataloader(self) -> BatchLoader | list[Any]:
        """The validation batches of this rank; an empty list if nothing was held out.

        Raises:
            UserError: Only validation is run, and no text was held out.
        """
        return self._held_out_batches("limit_val_batches")

    def test_dataloader(self) -> BatchLoader | list[Any]:
        """The held-out sequences that `val_dataloader` gives, under `Trainer.test`."""
        return self._held_out_batches("limit_test_batches")

    def predict_dataloader(self) -> BatchLoader | list[Any]:
        """The held-out sequences that `val_dataloader` gives, in the same order."""
        return self._held_out_batches("limit_predict_batches")

    def _held_out_batches(self, limited_by: str) -> BatchLoader | list[Any]:
        assert self.trainer is not None
        return held_out_loader(
            self.trainer,
            self._validation_sequences(),
            self.micro_batch_size,
            self._data_parallel(),
            limited_by=limited_by,
            folders=", ".join(data.path for data in self.sources),
            remedy=self.sources[0].how_to_hold_out,
        )

    def teardown(self, stage: str) -> None:
        """End the worker processes."""
        if self._training_loader is not None:
            self._training_loader.close()
            self._training_loader = None

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream, and the identity of the stream."""
        return {**self._position.state_dict(self.trainer), "data": self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the position of a checkpoint.

        Raises:
            UserError: The stream is another one, and `allow_data_change` is off.
        """
        fitting = self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING
        if fitting and not self.allow_data_change:
            check_same_stream(state_dict["data"], self._identity())
        self._position.load_state_dict(state_dict)

    def _identity(self) -> dict[str, Any]:
        identity = stream_identity(
            self.sources,
            self.weights,
            self.sequence_length,
            self.seed,
            self.shuffle_window,
            self.document_mask,
        )
        if self.document_mask and self.tokenizer is None:
            identity["end_of_document"] = self.end_of_document
        return identity

    def _validation_sequences(self) -> ValidationSequences:
        counts = validation_counts(
            self.sources, self.weights, self.sequence_length, self.validation_sequences
        )
        return ValidationSequences(self.sources, counts, self.sequence_length)
