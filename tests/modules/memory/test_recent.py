"""What generation keeps of the past: rows of different lengths, short prompts, rows that leave."""

from typing import Any

import numpy as np
import pytest
import torch
from networks import MEMORIES, tiny_transformer
from torch import Tensor

from mhc_lightning.modules.memory.recent import RecentWindow

END = 7  # the token that ends documents, and the one that pads, too


def network(name: str, **changes: Any) -> Any:
    """A network in whose memory every part acts."""
    model = tiny_transformer(memory=MEMORIES[name], **changes).double().eval()
    model.memory.bind(np.arange(40) // 2, END)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.3 * noise)
    return model


def test_a_window_holds_the_last_positions_of_each_row() -> None:
    window = RecentWindow(torch.full((3, 4), -1))
    seen: list[list[int]] = [[-1] * 4 for _ in range(3)]
    for counts in ([1, 3, 2], [2, 1, 3], [1, 1, 1]):
        new = torch.randint(0, 99, (3, 3))
        extended = window.extend(new)
        assert extended.tolist() == [
            past[-4:] + row.tolist() for past, row in zip(seen, new, strict=True)
        ]
        window.advance(torch.tensor(counts), 3)
        for past, row, count in zip(seen, new.tolist(), counts, strict=True):
            past += row[:count]
        assert window.values.tolist() == [past[-4:] for past in seen]
    window.keep(torch.tensor([2, 0]))
    assert window.values.tolist() == [seen[2][-4:], seen[0][-4:]]


def test_a_window_without_positions_holds_none() -> None:
    window = RecentWindow(torch.zeros(2, 0, 5))
    assert window.extend(torch.ones(2, 3, 5)).shape == (2, 3, 5)
    window.advance(torch.tensor([1, 3]), 3)
    assert window.values.shape == (2, 0, 5)


def cached(model: Any, rows: list[Tensor], splits: list[list[int]]) -> list[list[Tensor]]:
    """Logits of each row after each of its parts, in one batch that the longest rows leave last."""
    caches = model.new_caches(len(rows), 40)
    running, done = list(range(len(rows))), [0] * len(rows)
    found: list[list[Tensor]] = [[] for _ in rows]
    for step in range(max(map(len, splits))):
        staying = [place for place, k in enumerate(running) if step < len(splits[k])]
        if len(staying) < len(running):
            for cache in caches:
                cache.keep(torch.tensor(staying))
            running = [running[place] for place in staying]
        counts = torch.tensor([splits[k][step] for k in running])
        tokens = torch.full((len(running), int(counts.max())), END)
        for place, k in enumerate(running):
            count = splits[k][step]
            tokens[place, :count] = rows[k][done[k] : done[k] + count]
            done[k] += count
        for k, logits in zip(running, model.forward_cached(tokens, caches, counts), strict=True):
            found[k].append(logits)
    return found


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("connection", ["mhc", "mhc_single_pass", "residual"])
@torch.no_grad()
def test_any_division_of_ragged_rows_gives_the_logits_of_whole_rows(
    name: str, connection: str
) -> None:
    model = network(name, connection=connection, num_layers=3)
    # Prompts shorter than the longest n-gram, one token at a time, and whole.
    splits = [[1, 1, 1, 1, 1, 1], [2, 7, 1], [12, 1, 3, 1], [1, 14], [5, 5, 5, 5, 1]]
    rows = [torch.randint(0, 40, (sum(split),)) for split in splits]
    rows[0][2] = rows[1][1] = rows[2][11] = rows[3][0] = rows[4][4] = END  # at the parts' ends, too
    rows[2][5:8] = END  # a document of nothing
    for row, split, found in zip(rows, splits, cached(model, rows, splits), strict=True):
        whole = model(row[None])[0]
        ends = np.cumsum(split) - 1
        torch.testing.assert_close(torch.stack(found), whole[ends])
        other = row.clone()
        other[max(0, len(row) - 3)] = (other[max(0, len(row) - 3)] + 2) % 40
        assert not torch.allclose(model(other[None])[0, -1], whole[-1])


@pytest.mark.parametrize("name", MEMORIES)
@torch.no_grad()
def test_a_memory_does_not_look_beyond_a_documents_start(name: str) -> None:
    """The rows are those of the document alone, in caches as in whole sequences."""
    model = network(name)
    document = torch.randint(8, 40, (1, 6))
    alone = model.recall(document)
    for before in ([END], [3, END], [9, 9, 9, END]):
        tokens = torch.cat([torch.tensor([before]), document], 1)
        history = model.memory.new_history(1, tokens.device)
        recalled = model.recall(tokens[:, :-4], history.values)
        history.extend(tokens[:, :-4])
        history.advance(torch.tensor([tokens.shape[1] - 4]), tokens.shape[1] - 4)
        later = model.recall(tokens[:, -4:], history.values)
        for place, rows in alone.items():
            found = torch.cat([recalled[place], later[place]], 1)
            assert torch.equal(found[:, len(before) :], rows)


def test_a_cache_holds_values_and_gates_in_float32_whatever_the_network_has() -> None:
    model = network("engram").bfloat16()
    caches = model.new_caches(2, 9)
    kept = caches[0].memory.values
    assert kept.dtype == torch.float32 and kept.shape == (2, 9, 16 + 4)
    assert caches[-1].values.dtype == torch.int64 and caches[-1].values.shape == (2, 2)
    assert network("engram_without_conv").new_caches(2, 9)[0].memory is None
