"""From tokens to rows of n-gram tables: moduli, multipliers, and the hash of each suffix n-gram.

Shapes: B batch, S sequence, L tables, H heads of a table (orders times heads per order), N the
longest order, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mhc_lightning.errors import UserError

Scheme = Literal["multiply_xor", "polynomial"]

ROW_MULTIPLE = 64  # heads begin at multiples of it, so that tables are cut between heads or rows
NOT_A_TOKEN = -1  # in a history: there is no token that far back
UNBOUND = -2  # in place of the token that ends documents, as long as no tokenizer is bound
_LARGEST = int(np.iinfo(np.int64).max)
_SEED_PER_TABLE = 10007


class NgramLayout(NamedTuple):
    """The sizes of hashed n-gram tables; they do not depend on the tokenizer.

    Attributes:
        tables: Numbers that enter each table's seed: for Engram the blocks, from 0.
        orders: n of each n-gram, ascending, at least 2.
        num_heads: Heads (hash functions) of each order.
        moduli: Rows of each head, [L][H], order by order. No two are equal.
    """

    tables: tuple[int, ...]
    orders: tuple[int, ...]
    num_heads: int
    moduli: tuple[tuple[int, ...], ...]

    @property
    def longest(self) -> int:
        """N: the hash of a position depends on its last N tokens."""
        return max(self.orders)

    @property
    def heads(self) -> int:
        """H: rows that one position reads in one table."""
        return len(self.orders) * self.num_heads

    @property
    def rows_per_head(self) -> int:
        """Rows from one head's first to the next one's: the largest modulus, rounded up."""
        largest = max(modulus for table in self.moduli for modulus in table)
        return math.ceil(largest / ROW_MULTIPLE) * ROW_MULTIPLE

    def used_rows(self, table: int) -> int:
        """Rows of a table that a hash can name: the sum of its moduli."""
        return sum(self.moduli[table])


def prime_layout(
    tables: Sequence[int], orders: Sequence[int], num_heads: int, rows: int | Sequence[int]
) -> NgramLayout:
    """Heads with distinct prime sizes (arXiv 2601.07372, released code).

    Tables, orders and heads ascend. Each order of each table starts at its `rows` and takes the
    next prime that no head before has.

    Args:
        tables: See `NgramLayout`.
        orders: See `NgramLayout`.
        num_heads: Heads of each order.
        rows: The least number of rows of a head, for all orders or for each.

    Raises:
        UserError: An argument is out of range.
    """
    from sympy import nextprime  # torch depends on it; importing it takes a while

    orders, sizes = _checked(orders, num_heads, rows)
    taken: set[int] = set()
    moduli = []
    for _ in tables:
        heads: list[int] = []
        for size in sizes:
            candidate = size - 1
            for _ in range(num_heads):
                candidate = int(nextprime(candidate))
                while candidate in taken:
                    candidate = int(nextprime(candidate))
                taken.add(candidate)
                heads.append(candidate)
        moduli.append(tuple(heads))
    return NgramLayout(tuple(tables), orders, num_heads, tuple(moduli))


def spaced_layout(orders: Sequence[int], num_heads: int, rows: int, vocab_size: int) -> NgramLayout:
    """One table whose head k has `rows + 2·k` rows (arXiv 2501.16975, released code).

    Args:
        orders: See `NgramLayout`.
        num_heads: Heads of each order.
        rows: Rows of the first head.
        vocab_size: V.

    Raises:
        UserError: An argument is out of range, or a head's rows are a multiple of V: such a head
            sees the last token alone, again and again.
    """
    orders, _ = _checked(orders, num_heads, rows)
    moduli = tuple(rows + 2 * k for k in range(len(orders) * num_heads))
    multiples = [modulus for modulus in moduli if modulus % vocab_size == 0]
    if multiples:
        raise UserError(
            f"memory.rows={rows} gives a head {multiples[0]} rows, a multiple of the"
            f" {vocab_size} tokens, and so the same row to all n-grams that end alike; use"
            f" memory.rows={rows + 1 if (rows + 1) % 2 or vocab_size % 2 else rows + 2}"
        )
    return NgramLayout((0,), orders, num_heads, (moduli,))


def _checked(
    orders: Sequence[int], num_heads: int, rows: int | Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    orders = tuple(orders)
    if not orders or min(orders) < 2 or list(orders) != sorted(set(orders)):
        raise UserError(
            f"memory.orders must be different whole numbers from 2 on, ascending, not"
            f" {list(orders)}"
        )
    if num_heads < 1:
        raise UserError(f"memory.num_heads must be at least 1, not {num_heads}")
    sizes = (rows,) * len(orders) if isinstance(rows, int) else tuple(rows)
    if len(sizes) != len(orders):
        raise UserError(
            f"memory.rows must be one number or one for each of the {len(orders)} orders, not"
            f" {list(sizes)}"
        )
    least = len(orders) * num_heads
    if min(sizes) < least:
        raise UserError(
            f"memory.rows={min(sizes)} is below the {least} heads of a table, each of which needs"
            f" a number of rows of its own; use at least memory.rows={least}"
        )
    return orders, sizes


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
        self.seed = seed
        self._given = multipliers
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
            history = tokens.new_full((len(tokens), before), NOT_A_TOKEN)
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
