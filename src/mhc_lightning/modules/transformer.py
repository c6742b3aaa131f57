"""A decoder-only language model whose residual connection is a parameter.

Shapes: B batch, S sequence, n streams, C width, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from mhc_lightning.errors import UserError
from mhc_lightning.kernels import (
    IGNORE_INDEX,
    aggregate_streams,
    expand_streams,
    mean_streams,
)
from mhc_lightning.kernels.argument_checks import check_values
from mhc_lightning.modules.attention import LatentAttention
from mhc_lightning.modules.block import Block, BlockCache, PreNorm, run_blocks
from mhc_lightning.modules.connection import Connection, Merged
from mhc_lightning.modules.construction import recording
from mhc_lightning.modules.document_window import DocumentWindow
from mhc_lightning.modules.documents import DOCUMENTS, Documents
from mhc_lightning.modules.feed_forward import SwiGLU
from mhc_lightning.modules.flops import training_flops_per_token
from mhc_lightning.modules.head_loss import count_targets, head_token_losses, mean_head_loss
from mhc_lightning.modules.initialisation import NormalMatrices, plan_normal, reset_modules
from mhc_lightning.modules.limits import require_at_least
from mhc_lightning.modules.memory import BlockMemory, HeadMemory, InputMemory, Memory, Recalled
from mhc_lightning.modules.memory.memory import MemoryPart
from mhc_lightning.modules.memory.stored import check_loaded
from mhc_lightning.modules.mixture_of_experts import MixtureOfExperts
from mhc_lightning.modules.norm import RMSNorm
from mhc_lightning.modules.precision import autocast_dtype
from mhc_lightning.modules.recompute import recomputing
from mhc_lightning.modules.recompute_size import resolve_recompute


class Transformer(nn.Module):
    """Embedding, blocks and head (DeepSeek-V3 style: latent attention, SwiGLU or experts).

    The embedding is copied to all streams once. The streams are read out once before the final
    norm, as their mean (or sum: the norm removes the factor).

    Args:
        connection: Builds a connection from `dim`, `num_streams` and `layer_index`.
        vocab_size: V.
        dim: C.
        num_layers: Blocks; each has two sub-layers.
        num_heads: Attention heads.
        ffn_dim: Width of the feed-forward network, or of one expert if there are experts. Dense
            blocks of a model with experts are as wide as a token's active and shared experts.
        num_streams: n; a residual connection always has 1.
        head_dim: Width of a head's content query, content key and value.
        rope_dim: Width of a head's rotary query and key, even.
        kv_rank: Width of the key-value latent.
        rope_theta: Base of the rotary frequencies.
        num_experts: Routed experts per block; 0 makes every block dense.
        num_active_experts: Routed experts per token.
        num_shared_experts: Experts that process every token.
        num_dense_layers: Leading blocks without experts.
        bias_update_speed: Speed of the loss-free balancing.
        num_expert_groups: Groups of routed experts.
        num_active_expert_groups: Groups that a token's experts come from, at most.
        norm_eps: Epsilon of every RMSNorm.
        init_std: Standard deviation of all weight matrices at initialisation.
        memory: Builds a memory of n-grams from `vocab_size`, `model_dim`, `num_layers`,
            `num_streams` and `norm_eps`; by default there is none.

    Attributes:
        construction: The class and the arguments of this network and its parts, as plain data: see
            `construction.construct`. If they are no plain data, it says why.
        init_seed: Seed of the initial weights, drawn from torch's generator.
        recompute: The setting given to `set_recompute`.
        recompute_block_size: Sub-layers per recompute block; 0 (the default) keeps all streams.
        end_of_document: The token given to `mask_documents`; None (the default) to look at a
            sequence as a whole.

    Raises:
        UserError: A size is out of range.
    """

    parts_of_all_stages: ClassVar = ("memory",)
    construction: Mapping[str, Mapping[str, Any]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = recording(cls.__init__)  # type: ignore[method-assign]

    @recording
    def __init__(
        self,
        *,
        connection: Callable[..., Connection],
        vocab_size: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        ffn_dim: int,
        num_streams: int = 4,
        head_dim: int = 128,
        rope_dim: int = 64,
        kv_rank: int = 512,
        rope_theta: float = 10000.0,
        num_experts: int = 0,
        num_active_experts: int = 0,
        num_shared_experts: int = 0,
        num_dense_layers: int = 1,
        bias_update_speed: float = 0.001,
        num_expert_groups: int = 1,
        num_active_expert_groups: int = 1,
        norm_eps: float = 1e-20,
        init_std: float = 0.006,
        memory: Callable[..., Memory] = Memory,
    ) -> None:
        super().__init__()
        require_at_least(
            vocab_size=(vocab_size, 1),
            dim=(dim, 1),
            num_layers=(num_layers, 1),
            num_heads=(num_heads, 1),
            ffn_dim=(ffn_dim, 1),
            num_streams=(num_streams, 1),
            head_dim=(head_dim, 1),
            rope_dim=(rope_dim, 0),
            kv_rank=(kv_rank, 1),
            rope_theta=(rope_theta, 1),
            num_experts=(num_experts, 0),
            num_shared_experts=(num_shared_experts, 0),
            num_dense_layers=(num_dense_layers, 0),
            bias_update_speed=(bias_update_speed, 0),
            norm_eps=(norm_eps, 0),
            init_std=(init_std, 0),
        )
        # Layers draw from torch's generator, though not on meta. The seed is drawn first, so that
        # both builds get the same seed.
        with unset_fake_temporarily():
            self.init_seed = int(torch.randint(2**32, (), device="cpu"))
        self.vocab_size = vocab_size
        self.init_std = init_std
        self.embedding = nn.Embedding(vocab_size, dim)
        blocks = []
        for index in range(num_layers):
            attention = LatentAttention(
                dim, num_heads, head_dim, rope_dim, kv_rank, rope_theta, norm_eps
            )
            feed_forward: nn.Module
            if num_experts > 0 and index >= num_dense_layers:
                feed_forward = MixtureOfExperts(
                    dim,
                    ffn_dim,
                    num_experts,
                    num_active_experts,
                    num_shared_experts,
                    bias_update_speed,
                    num_expert_groups,
                    num_active_expert_groups,
                )
            else:
                experts_wide = num_active_experts + num_shared_experts if num_experts > 0 else 1
                feed_forward = SwiGLU(dim, ffn_dim * experts_wide)
            blocks.append(
                Block(
                    connection(dim=dim, num_streams=num_streams, layer_index=2 * index),
                    PreNorm(dim, norm_eps, attention),
                    connection(dim=dim, num_streams=num_streams, layer_index=2 * index + 1),
                    PreNorm(dim, norm_eps, feed_forward),
                )
            )
        self.recompute: str | int | None = "off"
        self.recompute_block_size = 0
        self.end_of_document: int | None = None
        self.num_streams = blocks[0].attention_connection.num_streams
        self.memory = memory(
            vocab_size=vocab_size,
            model_dim=dim,
            num_layers=num_layers,
            num_streams=self.num_streams,
            norm_eps=norm_eps,
        )
        self.input_memory = self.memory.input_memory()
        if self.memory.hash is not None:
            self.register_load_state_dict_pre_hook(check_loaded)
        for index, block in enumerate(blocks):
            block.memory = self.memory.block_memory(index)
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(dim, eps=norm_eps)
        self.output = nn.Linear(dim, vocab_size, bias=False)
        self.head_memory = self.memory.head_memory()
        for draw in self._plan_draws():
            draw()

    @property
    def parts_before_blocks(self) -> tuple[str, ...]:
        """Names of the submodules that `embed` uses."""
        return ("embedding",) if self.input_memory is None else ("embedding", "input_memory")

    @property
    def parts_behind_blocks(self) -> tuple[str, ...]:
        """Names of the submodules that `head_loss` uses."""
        head = ("norm", "output")
        return head if self.head_memory is None else (*head, "head_memory")

    def _memory_parts(self) -> list[nn.Module]:
        return [m for m in self.modules() if isinstance(m, InputMemory | BlockMemory | HeadMemory)]

    def _plan_draws(self) -> list[NormalMatrices]:
        return plan_normal(self, self.init_seed, self.init_std, last=self._memory_parts())

    def reset_parameters(self) -> None:
        """Draw every weight matrix from a normal distribution, and reset all other parameters.

        The draw depends on `init_seed` only: it is the same each time, and on any number of
        devices. Submodules that are reset one by one get the same values.

        Raises:
            UserError: A submodule has parameters and no `reset_parameters()`.
        """
        self._plan_draws()
        reset_modules(self)

    def mask_documents(self, end_of_document: int | None) -> None:
        """Keep the documents of a sequence apart, from the next forward pass on.

        Attention and a memory's convolution then stay within a document, and positions count from
        the first token of each. `LanguageModel` leaves first tokens out of the loss.

        Args:
            end_of_document: The token that ends a document; None to look at a sequence as a whole.

        Raises:
            UserError: The network has no such token, or its memory's n-grams look across documents.
        """
        if end_of_document is not None and not 0 <= end_of_document < self.vocab_size:
            raise UserError(
                f"the network cannot keep documents apart by token {end_of_document}: its tokens"
                f" are 0 to {self.vocab_size - 1}"
            )
        if end_of_document is not None and self.memory.hash is not None:
            if not self.memory.documents:
                raise UserError(
                    "data.document_mask=true keeps documents apart, and memory.documents=false has"
                    " n-grams look across them; use memory.documents=true"
                )
            bound = self.memory.hash.bound_constants()
            if bound is not None and bound["document_end"][0] != end_of_document:
                raise UserError(
                    f"the network cannot keep documents apart by token {end_of_document}: its"
                    " memory is bound to another tokenizer, or to none, and n-grams would look"
                    " across them; bind the data's (data.tokenizer=…)"
                )
        self.end_of_document = end_of_document

    def recall(
        self,
        tokens: Tensor,
        history: Tensor | None = None,
        documents: Documents | None = None,
    ) -> Recalled:
        """What the embedding and all blocks need to know of tokens [B, S], found once for all.

        Args:
            tokens: [B, S].
            history: The tokens before them, for a memory: see `Memory.recall`.
            documents: Those of the tokens, if tokens before them matter.
        """
        recalled = self.memory.recall(tokens, history)
        for part in self._held_memory_parts() if recalled else ():
            part.fetch_ahead(recalled)
        if self.end_of_document is None:
            return recalled
        return {**recalled, DOCUMENTS: documents or Documents.of(tokens, self.end_of_document)}

    def prefetch(self, tokens: Tensor, *, before_update: bool) -> None:
        """Begin to fetch what a memory recalls for the next micro-batch, if that takes a while.

        Args:
            tokens: [B, S], which `recall` will get.
            before_update: True if the present micro-batch is the last one of its optimizer step.
        """
        recalled = self.memory.recall(tokens)
        for part in self._held_memory_parts():
            part.prefetch(recalled, before_update)

    def _held_memory_parts(self) -> list[MemoryPart]:
        parts = [self.input_memory, *(getattr(block, "memory", None) for block in self.blocks)]
        return [part for part in parts if isinstance(part, MemoryPart)]

    def embed(self, tokens: Tensor, recalled: Recalled | None = None) -> Tensor:
        """Tokens [B, S] -> streams [B, S, n, C], all copies of the embedding.

        Under autocast the streams take autocast's dtype: n·C values per token travel in it.

        Args:
            tokens: [B, S].
            recalled: The result of `recall`, if it is there already.
        """
        x = self.embedding(tokens)
        if self.input_memory is not None:
            x = self.input_memory(x, self.recall(tokens) if recalled is None else recalled)
        return expand_streams(x.to(autocast_dtype(x) or x.dtype), self.num_streams)

    def carry_like(self, streams: Tensor) -> Tensor | None:
        """An uninitialised carry, as blocks return it beside streams [B, S, n, C], or None."""
        first = next(m for m in self.blocks.modules() if isinstance(m, Connection))
        return first.carry_like(streams)

    def read_out(self, streams: Tensor, carry: Tensor | None = None) -> Tensor:
        """Streams [..., n, C] -> normalised mean, or sum weighted by `carry`, [..., C]."""
        if carry is not None:
            return self.norm(aggregate_streams(streams, carry))
        return self.norm(mean_streams(streams))

    def head(self, streams: Tensor, carry: Tensor | None = None) -> Tensor:
        """Streams [..., n, C] and their carry -> logits [..., V]."""
        return self.output(self.read_out(streams, carry))

    def run_blocks(
        self,
        streams: Tensor,
        carry: Tensor | None = None,
        blocks: Sequence[nn.Module] = (),
        recalled: Recalled | None = None,
    ) -> Merged:
        """Take streams [B, S, n, C] and their carry through `blocks` (all of them by default).

        No recompute block reaches beyond these blocks. With a memory, or documents that are kept
        apart, they need the result of `recall`.
        """
        with recomputing(self.recompute_block_size):
            return run_blocks(list(blocks or self.blocks), streams, carry, recalled)

    def run(self, tokens: Tensor) -> Merged:
        """Take tokens [B, S] through the embedding and all blocks."""
        recalled = self.recall(tokens)
        streams = self.embed(tokens, recalled)
        # A `run_blocks` that someone has put in place may know of nothing recalled.
        return self.run_blocks(streams, recalled=recalled) if recalled else self.run_blocks(streams)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, S] -> logits [B, S, V]."""
        return self.head(*self.run(tokens))

    def loss(self, tokens: Tensor, targets: Tensor, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
        """Mean cross-entropy of targets [B, S], a float32 scalar, without all logits at once.

        All logits exist at once where `output` is no plain projection and has to be called: with
        an adapter, a bias, hooks, a parametrization or a quantised weight. Targets equal to
        `ignore_index` are left out, as in `linear_cross_entropy`. In training mode a memory may add
        to the loss (`OverDecoding`).
        """
        streams, carry = self.run(tokens)
        return self.head_loss(streams, carry, targets, ignore_index=ignore_index)

    def head_loss(
        self,
        streams: Tensor,
        carry: Tensor | None,
        targets: Tensor,
        *,
        ignore_index: int = IGNORE_INDEX,
    ) -> Tensor:
        """The part of `loss` that follows the blocks."""
        hidden = self.read_out(streams, carry)
        loss = mean_head_loss(self.output, hidden, targets, ignore_index)
        if self.head_memory is not None and self.training:
            loss = loss + self.head_memory(self.output, hidden, targets, ignore_index)
        return loss

    def token_losses(
        self, tokens: Tensor, targets: Tensor, *, ignore_index: int = IGNORE_INDEX
    ) -> Tensor:
        """Cross-entropy of each target [B, S], float32, without a gradient; 0 where ignored."""
        streams, carry = self.run(tokens)
        return self.head_token_losses(streams, carry, targets, ignore_index=ignore_index)

    def head_token_losses(
        self,
        streams: Tensor,
        carry: Tensor | None,
        targets: Tensor,
        *,
        ignore_index: int = IGNORE_INDEX,
    ) -> Tensor:
        """The part of `token_losses` that follows the blocks."""
        return head_token_losses(self.output, self.read_out(streams, carry), targets, ignore_index)

    def count_targets(self, targets: Tensor, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
        """The number of targets that `loss` is the mean over, an int64 scalar."""
        return count_targets(targets, ignore_index)

    def new_caches(self, batch_size: int, max_length: int) -> list[Any]:
        """Empty caches for `forward_cached`: of every block, and of the tokens if they matter."""
        like = next(p for p in self.parameters() if p.is_floating_point())
        caches: list[Any] = []
        for block in self.blocks:
            parts = list(block.modules())
            attention = next(m for m in parts if isinstance(m, LatentAttention))
            memory = next((m for m in parts if isinstance(m, BlockMemory)), None)
            caches.append(
                BlockCache(
                    attention.new_cache(batch_size, max_length, like.dtype),
                    None if memory is None else memory.new_cache(batch_size, like.dtype),
                )
            )
        history = self.memory.new_history(batch_size, like.device)
        if history is not None:
            caches.append(history)
        if self.end_of_document is not None:
            caches.append(DocumentWindow(batch_size, self.end_of_document, like.device))
        return caches

    def forward_cached(
        self, tokens: Tensor, caches: list[Any], counts: Tensor | None = None
    ) -> Tensor:
        """Continue the sequences in `caches` by tokens [B, S].

        Args:
            tokens: New tokens; a row with fewer than S ends with padding, any token.
            caches: What `new_caches` gave.
            counts: Number of new tokens of each row [B], from 1 to S; S by default.

        Returns:
            Logits [B, V] for the token after the last of each row.

        Raises:
            UserError: A count is out of range.
        """
        batch, most = tokens.shape
        if counts is None:
            counts = torch.full((batch,), most, device=tokens.device)
        check_values(
            ((counts >= 1) & (counts <= most)).all(),
            f"counts must be from 1 to {most} (new tokens of each row)",
        )
        streams, carry = self.run_cached(tokens, caches, counts)
        last = torch.arange(batch, device=tokens.device), counts - 1
        return self.head(streams[last], None if carry is None else carry[last])

    def run_cached(self, tokens: Tensor, caches: list[Any], counts: Tensor) -> Merged:
        """Take new tokens [B, S] through the embedding and all blocks, after those in `caches`.

        Args:
            tokens: New tokens; a row with fewer than S ends with padding, any token.
            caches: What `new_caches` gave.
            counts: Number of new tokens of each row [B], from 0 to S.

        Returns:
            Streams [B, S, n, C] and their carry.
        """
        most = tokens.shape[1]
        history, documents = None, None
        for seen in caches[len(self.blocks) :]:
            if isinstance(seen, DocumentWindow):
                documents = seen.extend(tokens)
            else:
                history = seen.values
                seen.extend(tokens)
            seen.advance(counts, most)
        recalled = self.recall(tokens, history, documents)
        more: dict[str, Any] = {"recalled": recalled} if recalled else {}
        streams, carry = self.embed(tokens, recalled), None
        for block, cache in zip(self.blocks, caches[: len(self.blocks)], strict=True):
            streams, carry = block(streams, carry, cache, **more)
            cache.advance(counts, most)
        return streams, carry

    def set_recompute(self, setting: str | int | None, blocks_per_stage: Sequence[int] = ()) -> int:
        """Choose whether backward rebuilds streams from the start of each recompute block.

        Args:
            setting: `"auto"` for the best size, `"off"` (False or None), or sub-layers per
                block.
            blocks_per_stage: Blocks of each pipeline stage; by default one stage with all blocks.

        Returns:
            Sub-layers per recompute block; 0 if nothing is recomputed, as with connections that
            cannot be replayed (an ordinary residual has nothing to gain).

        Raises:
            UserError: The setting has another value.
        """
        stages = [2 * blocks for blocks in blocks_per_stage or [len(self.blocks)]]
        size = resolve_recompute(setting, stages, self.num_streams)
        replays = any(m.replays for m in self.modules() if isinstance(m, Connection))
        self.recompute = setting
        self.recompute_block_size = size if replays else 0
        return self.recompute_block_size

    def compile_sublayers(self) -> None:
        """Compile attention and feed-forward in place, one region each.

        Connections are not compiled: their arithmetic is a few fused operators already, and hooks
        on their windows go on working.
        """
        for module in self.modules():
            if isinstance(module, PreNorm):
                module.compile()

    def flops_per_token(self, sequence_length: int) -> int:
        """Training FLOPs (forward and backward) per token: see `training_flops_per_token`."""
        return training_flops_per_token(self, sequence_length)
