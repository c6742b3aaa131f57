import pytest

from mhc_lightning.data import PreparedData
from mhc_lightning.data.validation_sequences import validation_batches, validation_counts


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("total", [1, 2, 7, 20, 21, 48])
def test_every_sequence_comes_once_and_ranks_get_equal_batches(
    total: int, size: int, world: int
) -> None:
    ranks = [validation_batches(total, size, rank, world) for rank in range(world)]
    used = sorted(index for batches in ranks for batch in batches for index in batch)
    assert used == list(range(len(used)))
    assert total <= len(used) < total + size * world, "less than a round of padding"
    assert len({len(batches) for batches in ranks}) == 1
    assert len({len(batch) for batches in ranks for batch in batches}) == 1
    assert all(1 <= len(batch) <= size for batches in ranks for batch in batches)


def test_nothing_to_validate_on() -> None:
    assert validation_batches(0, 4, 0, 1) == []


def test_counts_follow_the_weights_and_what_there_is(prepared: PreparedData) -> None:
    everything = validation_counts([prepared], [1.0], 64, None)[0]
    assert everything > 100
    assert validation_counts([prepared, prepared], [3.0, 1.0], 64, 40) == [30, 10]
    assert validation_counts([prepared], [1.0], 64, 10**6) == [everything]
    chunks = len(prepared.chunks("validation"))
    assert validation_counts([prepared], [1.0], 10**6, None) == [chunks], "each is one short one"
