"""A pretrained language model of transformers, n streams wide, as a `LanguageModel` trains it.

Shapes: B batch, S sequence, C width, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mhc_lightning.errors import UserError
from mhc_lightning.kernels import IGNORE_INDEX
from mhc_lightning.modules import Connection
from mhc_lightning.modules.construction import UNKNOWN, plain, recording
from mhc_lightning.modules.flops import training_flops_per_token
from mhc_lightning.modules.head_loss import count_targets, head_token_losses, mean_head_loss
from mhc_lightning.upcycling.cache_name import cache_name
from mhc_lightning.upcycling.pretrained_files import (
    architecture_of,
    build_described,
    load_pretrained,
)
from mhc_lightning.upcycling.upcycle import upcycle
from mhc_lightning.upcycling.wide_block import WideBlock

_TRAIN = ("all", "connections")


class PretrainedNetwork(nn.Module):
    """A causal language model of transformers, made n streams wide by `upcycle`.

    Its weights are float32. Each process reads them whole.

    Args:
        pretrained: A folder with a model, a name on the Hugging Face hub, or a GGUF file.
        connection: Builds a connection from `dim`, `num_streams` and `layer_index`.
        num_streams: n; a residual connection always has 1.
        train: `"all"`, or `"connections"` to freeze everything that was pretrained.
        attention: The implementation of attention: `eager`, `sdpa` or another of transformers;
            None for its own choice.
        architecture: What a checkpoint says of the model: its configuration in transformers. Then
            `pretrained` is not read, and the weights are initial until the checkpoint's are loaded.

    Attributes:
        network: The model of transformers.
        pretrained: As given.
        vocab_size: V.

    Raises:
        UserError: The model cannot be read or upcycled, or a setting has another value.
    """

    builds_on_meta: ClassVar = False  # its values come from files

    construction: dict[str, Any]  # as `Transformer` has it

    @recording
    def __init__(
        self,
        *,
        pretrained: str,
        connection: Callable[..., Connection],
        num_streams: int = 4,
        train: str = "all",
        attention: str | None = None,
        architecture: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if train not in _TRAIN:
            raise UserError(f"train must be all or connections, not {train!r}")
        self.pretrained = pretrained
        if architecture is None:
            self.network = load_pretrained(pretrained, attention)
        else:
            self.network = build_described(architecture, attention)
        self._record_architecture()
        self._recomputes = False
        self._plain_head = self._head_is_plain()
        upcycle(self.network, connection, num_streams).train()
        self.vocab_size = int(self.network.get_input_embeddings().weight.shape[0])
        if train == "connections":
            self._freeze_pretrained()

    def _record_architecture(self) -> None:
        """Add the model's configuration to what a checkpoint says of this network."""
        record = self.construction["model"]
        if UNKNOWN not in record:
            record["architecture"] = plain(architecture_of(self.network))

    def _freeze_pretrained(self) -> None:
        own = {
            parameter
            for module in self.modules()
            if isinstance(module, Connection)
            for parameter in module.parameters()
        }
        if not own:
            raise UserError(
                "train=connections leaves nothing to train: the connections have no parameters;"
                " choose another connection, or train=all"
            )
        for parameter in self.parameters():
            parameter.requires_grad_(parameter in own)

    @torch.no_grad()
    def _head_is_plain(self) -> bool:
        """Whether the logits are the output projection of the last hidden state, and no more."""
        tokens = torch.arange(min(4, self.network.config.get_text_config().vocab_size))[None]
        hidden = self._hidden(tokens)
        return torch.equal(self._output(hidden), self.network(tokens, use_cache=False).logits)

    def _hidden(self, tokens: Tensor) -> Tensor:
        return self.network.base_model(input_ids=tokens, use_cache=False).last_hidden_state

    @property
    def _output(self) -> Any:
        return self.network.get_output_embeddings()

    @property
    def blocks(self) -> list[nn.Module]:
        """The wide blocks, in order."""
        return [module for module in self.network.modules() if isinstance(module, WideBlock)]  # type: ignore[misc]

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, S] -> logits [B, S, V]."""
        return self.network(input_ids=tokens, use_cache=False).logits

    def loss(self, tokens: Tensor, targets: Tensor, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
        """Mean cross-entropy of targets [B, S], a float32 scalar: see `Transformer.loss`.

        All logits exist at once where the model changes them behind its output projection.
        """
        return mean_head_loss(*self._head(tokens), targets, ignore_index)

    def token_losses(
        self, tokens: Tensor, targets: Tensor, *, ignore_index: int = IGNORE_INDEX
    ) -> Tensor:
        """Cross-entropy of each target [B, S], float32, without a gradient; 0 where ignored."""
        return head_token_losses(*self._head(tokens), targets, ignore_index)

    def _head(self, tokens: Tensor) -> tuple[nn.Module, Tensor]:
        """The output projection and what it is applied to; no projection, behind logits."""
        if self._plain_head:
            return self._output, self._hidden(tokens)
        return nn.Identity(), self(tokens)

    def count_targets(self, targets: Tensor, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
        """The number of targets that `loss` is the mean over, an int64 scalar."""
        return count_targets(targets, ignore_index)

    def new_caches(self, batch_size: int, max_length: int) -> list[Any]:
        """Empty caches for `forward_cached`."""
        from transformers import DynamicCache

        mask = torch.ones(batch_size, 0, dtype=torch.int64, device=self._output.weight.device)
        return [_Cache(DynamicCache(config=self.network.config), mask)]

    def forward_cached(
        self, tokens: Tensor, caches: list[Any], counts: Tensor | None = None
    ) -> Tensor:
        """Continue the sequences in `caches` by tokens [B, S]: see `Transformer.forward_cached`."""
        (cache,), (batch, most) = caches, tokens.shape
        if counts is None:
            counts = torch.full((batch,), most, device=tokens.device)
        # Models of transformers take padding at the left.
        places = torch.arange(most, device=tokens.device) - (most - counts[:, None])
        tokens = tokens.gather(1, places.clamp(min=0))
        cache.mask = torch.cat([cache.mask, (places >= 0).long()], 1)
        positions = (cache.mask.cumsum(1) - 1).clamp(min=0)[:, -most:]
        return self.network(
            input_ids=tokens,
            attention_mask=cache.mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{cache_name(): cache.past},
        ).logits[:, -1]

    def set_recompute(self, setting: str | int | None, blocks_per_stage: Sequence[int] = ()) -> int:
        """Choose whether backward computes each block again (gradient checkpointing).

        Args:
            setting: `"auto"` for it, `"off"` (False or None) for none.
            blocks_per_stage: Of a pipeline; there is none.

        Returns:
            0: no streams are rebuilt from outputs that are kept.

        Raises:
            UserError: The setting is a number of sub-layers.
        """
        if setting not in ("auto", "off", False, None):
            raise UserError(
                f"recompute={setting} is not possible with a pretrained model, whose blocks are"
                " computed again as a whole (gradient checkpointing); use recompute=auto or off"
            )
        if setting == "auto":
            self.network.gradient_checkpointing_enable({"use_reentrant": False})
        elif self._recomputes:
            self.network.gradient_checkpointing_disable()
        self._recomputes = setting == "auto"
        return 0

    def compile_sublayers(self) -> None:
        """Compile the parts of the blocks in place, but for the connections."""
        for block in self.blocks:
            for name, part in block.named_children():
                if name != "connections":
                    part.compile()

    def flops_per_token(self, sequence_length: int) -> int:
        """Training FLOPs (forward and backward) per token, with all experts of a block counted."""
        config = self.network.config.get_text_config()
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        attention = config.num_hidden_layers * sequence_length * heads * 2 * width
        return training_flops_per_token(self, sequence_length) + 3 * attention


class _Cache:
    """Keys and values of a model of transformers, and which of them are tokens.

    Args:
        past: Its own cache.
        mask: [B, tokens so far], int64, 0 for padding.
    """

    def __init__(self, past: Any, mask: Tensor) -> None:
        self.past, self.mask = past, mask

    def keep(self, rows: Tensor) -> None:
        """Keep the given rows [K] only."""
        self.past.batch_select_indices(rows)
        self.mask = self.mask[rows]
