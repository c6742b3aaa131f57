"""The LightningModule: its loss, optimizer, schedule, and the numbers that every run logs."""

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Self

import torch
from lightning.fabric.utilities.data import AttributeDict
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from mhc_lightning.checkpoints.forms import read_folders_too
from mhc_lightning.checkpoints.hyper_parameters import (
    hyper_parameters,
    keep_records,
    records_of,
)
from mhc_lightning.checkpoints.rebuilding import load_module
from mhc_lightning.checkpoints.saved_memory import (
    check_saved_memory,
    lacks_memory,
    load_beside_memory,
    memory_in,
)
from mhc_lightning.data.document_mask import keep_documents_apart
from mhc_lightning.data.token_classes import bind_tokenizer
from mhc_lightning.data.tokenizers import Tokenizer
from mhc_lightning.errors import NonFiniteLossError, UserError
from mhc_lightning.held_out_steps import HeldOutSteps, inputs_and_targets
from mhc_lightning.loggers.trainer_loggers import declare_hyper_parameters
from mhc_lightning.modules.mixture_of_experts import LoadBalance
from mhc_lightning.optimizers.finiteness import last_gains
from mhc_lightning.optimizers.fit_length import UNKNOWN, steps_of_fit
from mhc_lightning.optimizers.recipes import OptimizerRecipe, takes_row_gradients
from mhc_lightning.optimizers.resumed_settings import (
    check_kind,
    group_settings,
    keep_present_settings,
)
from mhc_lightning.strategies.gradient_norm import (
    clip_to_norm,
    fetched_norm,
    rows_clipped_to_value,
)
from mhc_lightning.strategies.layout import layout_of
from mhc_lightning.strategies.placements import (
    place_tables,
    placement_of,
    require_placement,
    shared_out,
)
from mhc_lightning.strategies.row_stores import (
    finish_row_gradients,
    install_row_stores,
    leave_tables_to_stores,
    remove_row_stores,
    settle_rows,
)
from mhc_lightning.strategies.sharded_rows import tables_of
from mhc_lightning.strategies.sharding import shard_by_mesh
from mhc_lightning.trainer_checks import check_trainer
from mhc_lightning.upcycling import Network


class LanguageModel(HeldOutSteps):
    """Next-token prediction with a `Transformer`.

    A batch is int64 tokens [B, S + 1]. Shorter sequences are padded at their end with -100
    (`IGNORE_INDEX`); padding is not predicted, but experts count it in their load. A token t that
    is read and not predicted, as of a prompt, is -101 - t. The loss is the
    mean over the predicted tokens of a micro-batch. All micro-batches and ranks have the same
    weight in a step, whatever share of them is padding. Where documents are kept apart
    (`Transformer.mask_documents`), the first token of each is not predicted either.

    Logged against the number of completed optimizer steps, first 1:

    - `train/loss`: the mean over the micro-batches of an optimizer step
    - `train/grad_norm`, before clipping, and `train/learning_rate`
    - `val/loss` and `val/perplexity`: over all predicted tokens of all ranks, each with the same
      weight; NaN without any
    - `experts/max_violation` and `experts/mean_violation`, with experts: maximum and mean over
      layers of (largest load / mean load - 1) in the global batch

    Args:
        model: The network: a `Transformer`, a `PretrainedNetwork`, or another with their methods.
        optimizer: The optimizer recipe: `AdamWRecipe` or `MuonRecipe`.
        compile: Whether to compile the network's sub-layers.
        recompute: `"auto"`, `"off"` (False or None), or the number of sub-layers per recompute
            block, within which backward rebuilds streams.
    """

    def __init__(
        self,
        model: Network,
        optimizer: OptimizerRecipe,
        compile: bool = False,
        recompute: str | int | None = "off",
    ) -> None:
        super().__init__()
        settings = {"compile": compile, "recompute": recompute}
        self.save_hyperparameters(hyper_parameters(records_of(model, optimizer), **settings))
        self.model = model
        self.model.set_recompute(recompute)
        self.optimizer = optimizer
        self.compile_sublayers = compile
        self._configured = False
        self._optimizer_settings: list[dict[str, Any]] = []
        self._new_lr = False
        self._pending_weights: Mapping[str, Tensor] | None = None
        self._step_losses: list[Tensor] = []
        self._step_of_losses = -1
        self._bar_needs_loss = False

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path | IO[bytes],
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        *,
        allow: Collection[Any] = (),
        **kwargs: Any,
    ) -> Self:
        """The module as a checkpoint has it, with its network and its optimizer recipe.

        Args:
            checkpoint_path: A file or a folder, of a `ModelCheckpoint` or a `RunCheckpoint`; or a
                URL of a file, or an open one.
            map_location: Where the weights go, as for `torch.load`; the CPU by default.
            hparams_file: A `hparams.yaml` of Lightning's loggers, in place of what the checkpoint
                says of the module.
            strict: False to load the weights that fit, and warn of others.
            weights_only: False to rebuild pickled Python objects in the checkpoint, which can run
                code; they are refused otherwise.
            allow: Classes and functions outside this package that the network may be built with.
                Subclasses of `Transformer`, `Connection`, `Memory` and `OptimizerRecipe` need not
                be named once their modules are imported.
            kwargs: Arguments of the module in place of those saved: `model`, `optimizer`,
                `compile`, `recompute`, and what a subclass takes.

        Raises:
            UserError: The checkpoint is refused, or does not say how the module is built.
        """
        return load_module(
            cls,
            checkpoint_path,
            kwargs,
            map_location=map_location,
            hparams_file=hparams_file,
            strict=strict,
            trusted=weights_only is False,
            allow=allow,
        )

    @property
    def hparams_initial(self) -> AttributeDict:
        """The hyper-parameters as loggers get them: sections with the arguments of each part."""
        records = records_of(self.model, self.optimizer)
        return AttributeDict({**super().hparams_initial, **records})

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, S] -> logits [B, S, V]."""
        return self.model(tokens)

    def setup(self, stage: str) -> None:
        """Bind the network to the tokenizer of the data, if they have one, and to their documents.

        Checkpoints may be folders, whichever callback the trainer has, and TensorBoard shows the
        hyper-parameters beside the losses.

        Raises:
            UserError: The memory is bound to another tokenizer, or was trained with one; the
                strategy cannot train it; or the network cannot keep the documents apart.
        """
        require_placement(self, self.trainer.strategy)
        read_folders_too(self.trainer.strategy)
        # Lightning makes the host wait after every micro-batch for what its bars show.
        bar = self.trainer.progress_bar_callback
        self._bar_needs_loss = bar is not None and not getattr(bar, "reads_metrics_itself", False)
        if stage == "fit":
            declare_hyper_parameters(self.trainer, self)
        data: Any = getattr(self.trainer, "datamodule", None)
        tokenizer = getattr(data, "tokenizer", None)
        if isinstance(tokenizer, Tokenizer):
            bind_tokenizer(memory_in(self.model), tokenizer)
        if hasattr(data, "document_boundary"):
            keep_documents_apart(self.model, data.document_boundary)

    def configure_model(self) -> None:
        """Compile the sub-layers if asked to, and shard the network if the strategy has a mesh."""
        if self._trainer is None:  # as in load_from_checkpoint: a trainer comes later
            return
        leave_tables_to_stores(self, self._gives_row_gradients)
        if self._configured:
            return
        self._configured = True
        if self.compile_sublayers:
            self.model.compile_sublayers()
        alone = getattr(self._trainer.strategy, "world_size", 1) == 1
        if alone and placement_of(self) == "host":
            place_tables(self, tables_of(self).values(), None)
        if self.device_mesh is not None:
            shard_by_mesh(self, self.model)
            self._load_pending_weights()

    @property
    def _uses_recipe(self) -> bool:
        """True unless a subclass has optimizers of its own."""
        return type(self).configure_optimizers is LanguageModel.configure_optimizers

    @property
    def _uses_recipe_schedule(self) -> bool:
        """True unless a recipe builds another schedule than its `learning_rate`."""
        return type(self.optimizer).build is OptimizerRecipe.build

    @property
    def lr(self) -> float:
        """The peak learning rate, which is the recipe's; a running fit follows another value.

        The learning-rate finder of Lightning reads it and sets it.
        """
        return self.optimizer.lr

    @lr.setter
    def lr(self, value: float) -> None:
        factor = value / self.optimizer.lr
        self.optimizer = replace(self.optimizer, lr=value)
        for group in self._optimizer_settings:
            if "initial_lr" in group:
                group["initial_lr"] *= factor
        self._new_lr = True

    @property
    def _gives_row_gradients(self) -> bool:
        """True if the tables of a memory get row gradients: other optimizers may not know them."""
        return self._uses_recipe and takes_row_gradients(self.optimizer)

    def teardown(self, stage: str) -> None:
        """Give the tables of a memory ordinary gradients again."""
        remove_row_stores(self)
        leave_tables_to_stores(self, False)

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Load the weights of a whole state dict.

        A network on `meta` loads the weights when it is sharded, each process its own part. The
        tensors must not change until then. A memory that the weights do not have keeps its initial
        values.

        Raises:
            UserError: The weights have another memory than the network.
        """
        self._begin_with(weights, whole=not any(p.is_meta for p in self.parameters()))

    def _begin_with(self, weights: Mapping[str, Tensor], whole: bool) -> None:
        if not lacks_memory(weights):
            check_saved_memory(memory_in(self.model), weights, "the weights to begin with")
        if whole:
            load_beside_memory(self, weights)
        self._pending_weights = None if whole else weights

    def _load_pending_weights(self) -> None:
        if self._pending_weights is not None:
            self._begin_with(self._pending_weights, whole=True)

    def on_fit_start(self) -> None:
        """Check the trainer; load pending weights, now that no parameter is on `meta`.

        Raises:
            UserError: The trainer would clip gradients wrongly, a callback would spoil the network,
                or the optimizer cannot update tables that are shared out.
        """
        check_trainer(self.trainer, self.model)
        if shared_out(self) and not self._gives_row_gradients:
            raise UserError(
                "the rows of the memory's tables are shared out among processes, or in the"
                " machine's memory, and only the optimizers of this package's recipes update them"
                " there; use one of these, or memory.placement=device with strategy=ddp"
            )
        self._load_pending_weights()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what `load_from_checkpoint` needs, whatever a subclass has saved."""
        keep_records(checkpoint, records_of(self.model, self.optimizer))
        checkpoint["end_of_document"] = getattr(self.model, "end_of_document", None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another memory, and the state of another kind of optimizer when a fit resumes.

        Raises:
            UserError: The checkpoint's memory is not that of the network, or its optimizer is Muon
                and the module's AdamW, or vice versa.
        """
        if self._trainer is None and "end_of_document" in checkpoint:  # else the data say so
            keep_documents_apart(self.model, checkpoint["end_of_document"])
        if checkpoint.get("state_dict"):
            check_saved_memory(memory_in(self.model), checkpoint["state_dict"], "the checkpoint")
        fitting = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        if fitting and self._uses_recipe:
            check_kind(checkpoint.get("optimizer_states"), self.optimizer)

    def on_train_start(self) -> None:
        """Keep the optimizer's present settings where a checkpoint has brought others.

        A memory without a tokenizer is bound to none from here on.
        """
        memory = memory_in(self.model)
        if not memory.is_bound:
            rank_zero_warn(
                "the memory has no tokenizer: it hashes no tokens alike, and n-grams do not end"
                " with documents; call bind_tokenizer of mhc_lightning.data.token_classes before"
                " the fit, or give the trainer a TextDataModule that has a tokenizer"
            )
            memory.bind_alone()
        schedule: Any = self.lr_schedulers()
        if not self._optimizer_settings or not isinstance(schedule, LambdaLR):
            return  # optimizers of a subclass, or a search for the learning rate
        if self._uses_recipe_schedule:
            self.optimizer.learning_rate.spread(schedule, self._total_steps())
        if self.trainer.ckpt_path is None and not self._new_lr:
            return
        changed = keep_present_settings(
            self._optimizer_settings, self.trainer.optimizers[0], schedule
        )
        if changed and not self._new_lr:
            words = ", ".join(f"{k}={now} (saved: {saved})" for k, (saved, now) in changed.items())
            rank_zero_warn(f"the optimizer has other settings than in the checkpoint: {words}")
        self._new_lr = False

    def _total_steps(self) -> int:
        """The optimizer steps of the fit, once the training loader is there.

        Raises:
            UserError: They are not known, and the learning rate depends on them.
        """
        steps = steps_of_fit(self.trainer)
        if steps == UNKNOWN and self.optimizer.schedule != "constant":
            raise UserError(
                f"the learning rate of optimizer.schedule={self.optimizer.schedule} depends on the"
                " number of steps, which is not known: give the trainer max_steps, or max_epochs"
                " with a loader that has a length, or take schedule=constant"
            )
        return steps

    def on_validation_start(self) -> None:
        """Load pending weights, now that no parameter is on `meta`."""
        self._load_pending_weights()

    def on_test_start(self) -> None:
        """Load pending weights, now that no parameter is on `meta`."""
        self._load_pending_weights()

    def on_predict_start(self) -> None:
        """Load pending weights, now that no parameter is on `meta`."""
        self._load_pending_weights()

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        """Begin to fetch the rows of the next micro-batch, if they are in the machine's memory.

        A loader tells the next micro-batch by `peek()`, as `TrainingLoader` does.
        """
        layout = layout_of(self.trainer.strategy)
        loader: Any = self.trainer.train_dataloader
        if memory_in(self.model).placement != "host" or layout.pipeline_group is not None:
            return  # the stages of a pipeline take parts of a batch
        following = loader.peek() if hasattr(loader, "peek") else None
        if following is not None:
            tokens, _ = inputs_and_targets(following.to(self.device, non_blocking=True))
            every = self.trainer.accumulate_grad_batches
            self.model.prefetch(tokens, before_update=(batch_idx + 1) % every == 0)

    def on_train_end(self) -> None:
        """Wait for the last update of rows in the machine's memory."""
        settle_rows(self)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean cross-entropy in nats of one micro-batch."""
        loss = self.model.loss(*self._inputs_and_targets(batch))
        self._log_loss(loss.detach())
        return loss

    @torch.compiler.disable  # `log` inspects its caller's functions, which Dynamo cannot
    def _log_loss(self, loss: Tensor) -> None:
        step = self.trainer.global_step
        if self._step_of_losses != step:
            self._step_losses, self._step_of_losses = [], step
        self._step_losses.append(loss)
        # Lightning logs the value of a step's last micro-batch: the mean over all of them.
        mean = torch.stack(self._step_losses).mean()
        self.log("train/loss", mean, prog_bar=self._bar_needs_loss, sync_dist=True)
        self.log("step", float(step + 1))

    def configure_optimizers(self) -> Any:
        """The recipe's optimizer, and its schedule over the steps of the fit.

        These are `max_steps`, or `max_epochs` times the steps of an epoch if that is less. The
        length of an epoch is known when training starts: see `on_train_start`.

        Raises:
            UserError: The trainer's `max_steps` is 0, or missing although the recipe builds a
                schedule of its own.
        """
        total_steps = self.trainer.max_steps
        if total_steps == 0:
            raise UserError("trainer.max_steps must be at least 1, not 0")
        if total_steps < 0:
            if not self._uses_recipe_schedule:
                raise UserError(
                    f"{type(self.optimizer).__name__} builds a schedule of its own, which needs the"
                    " number of steps: give the trainer max_steps"
                )
            total_steps = UNKNOWN
        if self._gives_row_gradients:
            install_row_stores(self, layout_of(self.trainer.strategy))
        optimizer, scheduler = self.optimizer.build(self, total_steps)
        self._optimizer_settings, self._new_lr = group_settings(optimizer), False
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Measure the gradients, log, stop if anything is not finite, then clip.

        All of this runs here, and not in `on_before_optimizer_step`: callbacks and subclasses may
        change the gradients there, and the norm is that of the gradients that are clipped.

        Raises:
            NonFiniteLossError: A loss or the gradient norm is not finite. The step has changed no
                weight yet.
        """
        finish_row_gradients(self)
        trained = [p for p in self.parameters() if p.grad is not None]
        norm, norm_here, loss_here = fetched_norm(
            trained,
            torch.stack(self._step_losses).sum(),
            layout_of(self.trainer.strategy).pipeline_group,
        )
        self._log_optimizer_step(optimizer, norm)
        self._log_expert_loads()
        self._require_finite(loss_here, norm_here)
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            clip_to_norm(trained, gradient_clip_val, norm)
            return
        with rows_clipped_to_value(trained, gradient_clip_val):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _log_optimizer_step(self, optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
        self.log("train/grad_norm", norm)
        self.log("train/learning_rate", optimizer.param_groups[0]["lr"])

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then rebalance the experts, so that no checkpoint falls between the two.

        If a callback has removed the gradients, the update is skipped, and the experts are not
        rebalanced.
        """
        super().optimizer_step(*args, **kwargs)
        updated = any(parameter.grad is not None for parameter in self.parameters())
        for balance in self._balances():
            if updated:
                balance.update()
            else:
                balance.load.zero_()

    def _balances(self) -> list[LoadBalance]:
        return [module for module in self.modules() if isinstance(module, LoadBalance)]

    def _log_expert_loads(self) -> None:
        """Sum the loads over the global batch; log how far the fullest expert exceeds the mean."""
        layout, violations = layout_of(self.trainer.strategy), []
        for balance in self._balances():
            layout.sum_over_data_parallel(balance.load)
            # float32 in stages of any dtype: a stage without experts does not know their dtype.
            violation = balance.load.max() / balance.load.mean() - 1
            violations.append(violation.float().nan_to_num(0))  # NaN: no tokens at all
        here = torch.stack(violations) if violations else torch.zeros(0, device=self.device)
        largest = here.max() if violations else torch.full((), -math.inf, device=self.device)
        total = torch.stack([here.sum(), torch.full_like(largest, len(violations))])
        layout.max_over_pipeline(largest)
        layout.sum_over_pipeline(total)
        if violations or (layout.pipeline_group is not None and total[1] > 0):
            self.log("experts/max_violation", largest)
            self.log("experts/mean_violation", total[0] / total[1])

    def _require_finite(self, loss: float, grad_norm: float) -> None:
        """Raise NonFiniteLossError if a loss of the step, or the gradient norm, is not finite."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        subject, value = ("gradient", grad_norm) if math.isfinite(loss) else ("loss", loss)
        raise NonFiniteLossError(
            f"the {subject} became {'NaN' if math.isnan(value) else 'infinite'}",
            self.trainer.global_step + 1,
            last_gains(self.trainer),
        )
