"""From tokens to rows of n-gram tables: multipliers, and the hash of each suffix n-gram.

Shapes: B batch, S sequence, L tables, H heads of a table (orders times heads per order), N the
longest order, V vocabulary.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from mhc_lightning.errors import UserError
from mhc_lightning.modules.memory.layout import NgramLayout
from mhc_lightning.modules.memory.settings import whole_number, whole_numbers

Scheme = Literal["multiply_xor", "polynomial"]

NOT_A_TOKEN = -1  # in a history: there is no token that far back
UNBOUND = -2  # in place of the token that ends documents, as long as no tokenizer is bound
_LARGEST = int(np.iinfo(np.int64).max)
_SEED_PER_TABLE = 10007


class NgramHash(nn.Module):
    """Hashes the suffix n-grams of every position to rows of tables, for all tables at once.

    With `multiply_xor` (arXiv 2601.07372) the n-gram (x_t, x_{t-1}, …) has
    h = (x_t · m_0) xor (x_{t-1} · m_1) xor …, modulo the rows of each head. The odd multipliers m
    of a table are drawn from its own seed. With `polynomial` (arXiv 2501.16975) it is
    h = x_t + x_{t-1} · V + x_{t-2} · V² + …, modulo the rows of each head.

    Before the first token of a sequence, or of a document if `document_end` is bound, stands the
    pad token. The result depends on tokens alone. It is exact in int64 on every device.

    All constants are buffers: a checkpoint holds them, and another program can compute the same
    rows from them.

    Args:
        layout: The sizes.
        vocab_size: V.
        scheme: The hash function.
        seed: Seed of the multipliers.
        multipliers: Multipliers [L][N] in place of drawn ones.

    Raises:
        UserError: The seed or the multipliers are out of range.

    Attributes:
        classes: [V], the compressed id of each token; at first each token is its own class.
        multipliers: [L, N], or [L, H, N] of `polynomial`.
        moduli: [L, H].
        pad: [1], the compressed id in place of a missing token.
        document_end: [1], the token (not compressed) that ends a document; -1 if n-grams do not end
            with documents, -2 as long as nothing is bound.
        orders: [H], n of each head's n-grams.
        tables: [L], numbers that enter the tables' seeds.
    """

    def __init__(
        self,
        layout: NgramLayout,
        vocab_size: int,
        scheme: Scheme = "multiply_xor",
        seed: int = 0,
        multipliers: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.vocab_size = vocab_size
        self.scheme: Scheme = scheme
        self.seed = whole_number("seed", seed, 0, _LARGEST)
        self._given = None if multipliers is None else _checked_multipliers(multipliers, layout)
        self._values = self._constants(np.arange(vocab_size), 0, UNBOUND)
        for name, value in self._values.items():
            self.register_buffer(name, torch.tensor(value))

    classes: Tensor
    multipliers: Tensor
    moduli: Tensor
    pad: Tensor
    document_end: Tensor
    orders: Tensor
    tables: Tensor

    def reset_parameters(self) -> None:
        """Fill the buffers, after they have come from `meta`."""
        for name, value in self._values.items():
            getattr(self, name).copy_(torch.tensor(value, device="cpu"))

    def bind(self, classes: np.ndarray, pad_token: int, document_end: int | None) -> None:
        """Take the classes of a tokenizer's tokens, from which the multipliers follow.

        Args:
            classes: int64 [V or fewer], the compressed id of each token. Tokens beyond them, which
                the tokenizer never gives, count as the pad token.
            pad_token: The token in place of a missing one, not compressed.
            document_end: The token that ends a document; None to look back across documents.

        Raises:
            UserError: The tokenizer has more tokens than V, or the hash is bound to another
                tokenizer.
        """
        if len(classes) > self.vocab_size:
            raise UserError(
                f"the tokenizer has {len(classes)} ids but model.vocab_size={self.vocab_size}; set"
                f" model.vocab_size={len(classes)} or more"
            )
        if pad_token >= len(classes):
            raise UserError(
                f"memory.pad_token={pad_token} is no token of the tokenizer, whose ids are 0 to"
                f" {len(classes) - 1}"
            )
        pad = int(classes[pad_token])
        whole = np.full(self.vocab_size, pad, dtype=np.int64)
        whole[: len(classes)] = classes
        end = NOT_A_TOKEN if document_end is None else document_end
        values = self._constants(whole, pad, end)
        if self.is_bound:
            present = self.constants()
            differing = [k for k, value in values.items() if not np.array_equal(present[k], value)]
            if differing:
                raise UserError(
                    "the memory is bound to another tokenizer, or was trained with one"
                    f" ({', '.join(differing)} differ); use that tokenizer"
                )
        self._values = values
        if not self.classes.is_meta:
            self.reset_parameters()

    @property
    def is_bound(self) -> bool:
        """True once `bind` was called, or the weights of a bound hash were loaded."""
        return int(self.constants()["document_end"][0]) != UNBOUND

    def constants(self) -> dict[str, np.ndarray]:
        """The buffers by name; on `meta`, the values that they will take."""
        if self.classes.is_meta:
            return self._values
        return {name: getattr(self, name).cpu().numpy() for name in self._values}

    def bound_constants(self) -> dict[str, np.ndarray] | None:
        """The constants of the tokenizer that was bound, whatever was loaded since; else None.

        Without a `bind`, they are those of loaded weights, if these are bound.
        """
        if int(self._values["document_end"][0]) != UNBOUND:
            return self._values
        return self.constants() if self.is_bound else None

    def forward(self, tokens: Tensor, history: Tensor | None = None) -> Tensor:
        """The rows of each position's n-grams.

        Args:
            tokens: int64 [B, S].
            history: int64 [B, N - 1], the tokens before them; -1 where there is none.

        Returns:
            int64 [L, B, S, H], rows of a table with `layout.rows_per_head` rows for each head.
        """
        back = self.look_back(tokens, history)  # N times [B, S]
        if self.scheme == "multiply_xor":
            hashes = self._multiply_xor(back)
        else:
            hashes = self._polynomial(back)
        starts = torch.arange(self.layout.heads, device=tokens.device) * self.layout.rows_per_head
        return hashes + starts

    def look_back(self, tokens: Tensor, history: Tensor | None = None) -> list[Tensor]:
        """The classes of the token 0, 1, … N - 1 before each position, N times [B, S].

        The pad token's class stands where there is no token, or one of another document.

        Args:
            tokens: As for `forward`.
            history: As for `forward`.
        """
        before, length = self.layout.longest - 1, tokens.shape[1]
        if history is None:
            history = tokens.new_full((tokens.shape[0], before), NOT_A_TOKEN)
        context = torch.cat([history, tokens], 1)
        exists, goes_on = context >= 0, context != self.document_end
        classes = torch.where(exists, self.classes[context.clamp(min=0)], self.pad)
        back, reaches = [], torch.ones_like(tokens, dtype=torch.bool)
        for distance in range(before + 1):
            here = slice(before - distance, before - distance + length)
            if distance:
                reaches = reaches & goes_on[:, here]
            back.append(torch.where(reaches, classes[:, here], self.pad))
        return back

    def _multiply_xor(self, back: list[Tensor]) -> Tensor:
        factors = self.multipliers[..., None, None]  # [L, N, 1, 1]
        mixed = back[0] * factors[:, 0]
        hashes = []
        for distance in range(1, self.layout.longest):
            mixed = mixed ^ (back[distance] * factors[:, distance])
            hashes += [mixed] * (self.layout.num_heads if distance + 1 in self.layout.orders else 0)
        return torch.stack(hashes, -1) % self.moduli[:, None, None]

    def _polynomial(self, back: list[Tensor]) -> Tensor:
        # Each product stays below V · m, and the sum of N of them in int64.
        stacked = torch.stack(back, -1)  # [B, S, N]
        products = stacked[:, :, None] * self.multipliers[:, None, None]  # [L, B, S, H, N]
        return products.sum(-1) % self.moduli[:, None, None]

    def _constants(self, classes: np.ndarray, pad: int, document_end: int) -> dict[str, np.ndarray]:
        layout = self.layout
        return {
            "classes": classes.astype(np.int64),
            "multipliers": self.multipliers_for(int(classes.max()) + 1),
            "moduli": np.array(layout.moduli, dtype=np.int64),
            "pad": np.array([pad], dtype=np.int64),
            "document_end": np.array([document_end], dtype=np.int64),
            "orders": np.repeat(np.array(layout.orders, dtype=np.int64), layout.num_heads),
            "tables": np.array(layout.tables, dtype=np.int64),
        }

    def multipliers_for(self, num_classes: int) -> np.ndarray:
        """The multipliers for tokens of so many classes: given ones, or those of the seed."""
        layout = self.layout
        if self._given is not None:
            return np.array(self._given, dtype=np.int64)
        if self.scheme == "polynomial":
            powers = np.zeros((len(layout.tables), layout.heads, layout.longest), dtype=np.int64)
            for table, moduli in enumerate(layout.moduli):
                for head, modulus in enumerate(moduli):
                    order = layout.orders[head // layout.num_heads]
                    powers[table, head, :order] = [
                        pow(self.vocab_size, k, modulus) for k in range(order)
                    ]
            return powers
        # Products of a class and a multiplier stay within int64.
        bound = max(1, _LARGEST // num_classes // 2)
        drawn = [
            np.random.default_rng(self.seed + _SEED_PER_TABLE * table).integers(
                0, bound, size=layout.longest, dtype=np.int64
            )
            for table in layout.tables
        ]
        return np.stack(drawn) * 2 + 1


def _checked_multipliers(
    multipliers: Sequence[Sequence[int]], layout: NgramLayout
) -> list[tuple[int, ...]]:
    count, length = len(layout.tables), layout.longest
    rows = multipliers if isinstance(multipliers, Sequence) else ()
    if [len(row) if isinstance(row, list | tuple) else 0 for row in rows] != [length] * count:
        raise UserError(
            f"memory.multipliers must be a list for each of the {count} blocks, of {length} numbers"
            f" each (for the last {length} tokens), not {multipliers}"
        )
    return [whole_numbers("multipliers", row, -_LARGEST - 1, _LARGEST) for row in rows]
