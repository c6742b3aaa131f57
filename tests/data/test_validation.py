import pytest

from mhc_lightning.data import PreparedData
from mhc_lightning.data.validation import validation_batches, validation_counts


@pytest.mark.parametrize(("total", "size", "world"), [(20, 4, 1), (21, 2, 3), (7, 4, 2), (3, 8, 2)])
def test_ranks_get_equal_batches_and_share_nothing(total: int, size: int, world: int) -> None:
    ranks = [validation_batches(total, size, rank, world) for rank in range(world)]
    used = [index for batches in ranks for batch in batches for index in batch]
    assert len(used) == len(set(used)) and set(used) <= set(range(total))
    assert len({len(batches) for batches in ranks}) == 1
    assert len({len(batch) for batches in ranks for batch in batches}) == 1
    assert total - len(used) < size * world


def test_too_few_for_every_rank_to_have_one() -> None:
    assert validation_batches(1, 4, 0, 2) == []
    assert validation_batches(0, 4, 0, 1) == []


def test_counts_follow_the_weights_and_what_there_is(prepared: PreparedData) -> None:
    everything = validation_counts([prepared], [1.0], 64, None)[0]
    assert everything > 100
    assert validation_counts([prepared, prepared], [3.0, 1.0], 64, 40) == [30, 10]
    assert validation_counts([prepared], [1.0], 64, 10**6) == [everything]
    assert validation_counts([prepared], [1.0], 10**6, None) == [0]
