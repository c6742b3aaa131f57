"""Rows of a table that lie on several processes: fetched by all-to-all, and their gradients sent.

Shapes: R rows of the table, D their width, H heads, W processes, P positions of this process, U
rows that are asked for.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class RowExchange:
    """The exchange of rows between processes that hold contiguous parts of a table.

    Process k holds rows k · ceil(R / W) to (k + 1) · ceil(R / W), as `torch.chunk` cuts them. All
    processes call each method at the same time; any of them may come with nothing.

    If the parts end between heads, a process asks every other one for equally many rows: those of
    its positions. Then nothing depends on the values of the rows' numbers, and the device need not
    wait for the host, nor the other way round. Otherwise each row is asked for once, in parts of
    different sizes, which the host has to know.

    Args:
        num_rows: R.
        heads: H; the last dimension of rows that are fetched.
        group: The processes.
        host_group: The same processes, for tensors in CPU memory.
    """

    def __init__(
        self, num_rows: int, heads: int, group: dist.ProcessGroup, host_group: dist.ProcessGroup
    ) -> None:
        self.num_rows, self.heads = num_rows, heads
        self.group, self._host_group = group, host_group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.each = -(-num_rows // self.size)
        self.by_heads = heads % self.size == 0 and self.each * self.size == num_rows

    @property
    def first(self) -> int:
        """The first row that this process holds."""
        return min(self.each * self.rank, self.num_rows)

    @torch.no_grad()
    def fetch(self, rows: Tensor, held: Tensor) -> Tensor:
        """Rows, int64 [..., H] -> their values [..., H, D].

        Args:
            rows: Numbers in the whole table.
            held: The rows that this process holds, [R / W, D].
        """
        if self.size == 1:
            return held[rows]
        if self.by_heads:
            return self._fetch_heads(rows, held)
        unique, places = torch.unique(rows, return_inverse=True)
        asked = self._counts(unique)
        theirs = self._swap_counts(asked)
        wanted = self._exchange(unique, asked, theirs)
        return self._exchange(held[wanted - self.first], theirs, asked)[places]

    @torch.no_grad()
    def send(self, rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Send values to the processes that hold their rows.

        Args:
            rows: int64 [U], ascending.
            values: [U, D].

        Returns:
            Rows of this process and their values, from all processes, in the order of these.
        """
        if self.size == 1:
            return rows, values
        sent = self._counts(rows)
        received = self._swap_counts(sent)
        return self._exchange(rows, sent, received), self._exchange(values, sent, received)

    def sum(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over the processes, and return it."""
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def _fetch_heads(self, rows: Tensor, held: Tensor) -> Tensor:
        each = self.heads // self.size  # heads of a process
        by_owner = rows.reshape(-1, self.size, each).transpose(0, 1)  # [W, P, H / W]
        mine = [by_owner[0].numel()] * self.size
        theirs = [positions * each for positions in self._gather_counts(by_owner.shape[1])]
        wanted = self._exchange(by_owner.flatten(), mine, theirs)
        values = self._exchange(held[wanted - self.first], theirs, mine)  # [W · P · H / W, D]
        values = values.view(*by_owner.shape, held.shape[1]).transpose(0, 1)
        return values.reshape(*rows.shape, held.shape[1])

    def _counts(self, rows: Tensor) -> list[int]:
        """How many of the ascending rows each process holds."""
        starts = torch.arange(1, self.size, device=rows.device) * self.each
        edges = [0, *torch.searchsorted(rows, starts).tolist(), len(rows)]
        return [end - start for start, end in itertools.pairwise(edges)]

    def _gather_counts(self, count: int) -> list[int]:
        counts = torch.empty(self.size, dtype=torch.int64)
        dist.all_gather_into_tensor(counts, torch.tensor([count]), group=self._host_group)
        return counts.tolist()

    def _swap_counts(self, counts: Sequence[int]) -> list[int]:
        swapped = torch.empty(self.size, dtype=torch.int64)
        dist.all_to_all_single(swapped, torch.tensor(counts), group=self._host_group)
        return swapped.tolist()

    def _exchange(self, tensor: Tensor, sent: list[int], received: list[int]) -> Tensor:
        result = tensor.new_empty(sum(received), *tensor.shape[1:])
        dist.all_to_all_single(result, tensor.contiguous(), received, sent, group=self.group)
        return result


def host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same processes that moves tensors in CPU memory."""
    if dist.get_backend(group) == "gloo":
        return group
    ranks = dist.get_process_group_ranks(group)
    return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
