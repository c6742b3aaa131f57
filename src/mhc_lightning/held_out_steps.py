"""The steps over held-out text: loss of a validation or test split, log-likelihood of sequences."""

from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor

from mhc_lightning.data.context_tokens import targets_of, tokens_of
from mhc_lightning.errors import UserError
from mhc_lightning.kernels import IGNORE_INDEX
from mhc_lightning.kernels.argument_checks import check_values
from mhc_lightning.strategies.layout import layout_of


def inputs_and_targets(batch: Tensor, end_of_document: int | None = None) -> tuple[Tensor, Tensor]:
    """Split a batch, int64 [B, S + 1], into the tokens that are read and the targets, each [B, S].

    The network reads padding (-100) as token 0. Under causal attention only further padding attends
    to it. A token below -100 is read and not predicted (`data.context_tokens`).

    Args:
        batch: [B, S + 1].
        end_of_document: The token whose successor is no target, as the first of another document.

    Raises:
        UserError: The batch is no such tensor; or a token follows padding, and would attend to it.
    """
    if not isinstance(batch, Tensor) or batch.dim() != 2 or batch.dtype != torch.int64:
        found = type(batch).__name__
        if isinstance(batch, Tensor):
            found = f"{str(batch.dtype).removeprefix('torch.')} {list(batch.shape)}"
        raise UserError(
            f"a batch must be a tensor of int64 tokens [B, S + 1], not {found}; give the DataLoader"
            " a tensor [N, S + 1], or a dataset whose items are int64 [S + 1]"
        )
    padding = batch[:, :-1] == IGNORE_INDEX
    check_values(
        (~padding | (batch[:, 1:] == IGNORE_INDEX)).all(),
        f"a batch has tokens behind {IGNORE_INDEX}, which may only pad the end of a sequence; to"
        f" leave token t within out of the loss, give {IGNORE_INDEX - 1} - t in its place",
    )
    inputs, targets = tokens_of(batch[:, :-1]), targets_of(batch[:, 1:])
    if end_of_document is not None:
        targets = targets.masked_fill(inputs == end_of_document, IGNORE_INDEX)
    return inputs.masked_fill(padding, 0), targets


class SequenceScores(NamedTuple):
    """What `Trainer.predict` returns for each batch.

    Attributes:
        log_likelihood: float64 [B] (float32 on Apple's GPUs): the sum of ln p(token | tokens before
            it) over the predicted tokens of each sequence, in nats; 0 for one of padding alone.
        num_tokens: int64 [B]: the number of tokens predicted, all of a sequence but its first (of
            each document, where documents are kept apart).
    """

    log_likelihood: Tensor
    num_tokens: Tensor


class HeldOutSteps(pl.LightningModule):
    """The part of a `LanguageModel` that runs under `validate`, `test` and `predict`."""

    model: Any  # a `Network`; its kinds have more than they share

    def on_validation_epoch_start(self) -> None:
        """Reset the sum of the validation tokens' losses, and their number."""
        self._reset_sums()

    def on_test_epoch_start(self) -> None:
        """Reset the sum of the test tokens' losses, and their number."""
        self._reset_sums()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Add the losses of a batch's predicted tokens, and their number."""
        self._add(batch)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Add the losses of a batch's predicted tokens, and their number."""
        self._add(batch)

    def on_validation_epoch_end(self) -> None:
        """Log loss and perplexity of the whole validation set; all tokens have the same weight."""
        self._log_means("val")

    def on_test_epoch_end(self) -> None:
        """Log loss and perplexity of the whole test set; all tokens have the same weight."""
        self._log_means("test")

    def predict_step(self, batch: Tensor, batch_idx: int) -> SequenceScores:
        """The log-likelihood of each sequence of a batch: a document's, if each row holds one.

        Each process scores its own share of the sequences.
        """
        inputs, targets = self._inputs_and_targets(batch)
        losses = self.model.token_losses(inputs, targets)
        return SequenceScores(
            -losses.sum(dim=-1, dtype=self._sum_dtype), (targets != IGNORE_INDEX).sum(dim=-1)
        )

    def _inputs_and_targets(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        inputs, targets = inputs_and_targets(batch, getattr(self.model, "end_of_document", None))
        if (size := getattr(self.model, "vocab_size", None)) is not None:
            check_values(
                (inputs < size).all() & (targets < size).all(),
                f"a batch has tokens that are not below the model's vocabulary of {size}; use the"
                " tokenizer of the model, or a model with a larger vocabulary",
            )
        return inputs, targets

    @property
    def _sum_dtype(self) -> torch.dtype:
        # In float64 the order and size of batches do not show. Apple's GPUs have no float64.
        return torch.float32 if self.device.type == "mps" else torch.float64

    def _reset_sums(self) -> None:
        self._loss_and_count = torch.zeros(2, dtype=self._sum_dtype, device=self.device)

    def _add(self, batch: Tensor) -> None:
        inputs, targets = self._inputs_and_targets(batch)
        total = self.model.token_losses(inputs, targets).sum(dtype=self._loss_and_count.dtype)
        self._loss_and_count += torch.stack([total, self.model.count_targets(targets)])

    def _log_means(self, split: str) -> None:
        layout_of(self.trainer.strategy).sum_over_data_parallel(self._loss_and_count)
        total, count = self._loss_and_count
        self.log(f"{split}/loss", total / count, prog_bar=True, sync_dist=True)  # equal everywhere
        self.log(f"{split}/perplexity", (total / count).exp(), sync_dist=True)
        self.log(f"{split}/tokens", count, logger=False, sync_dist=True)
        self.log("step", float(self.trainer.global_step))
