"""The order of training is a pure function of seed, epoch and position."""

import pickle

import numpy as np
import pytest

from mhc_lightning.data.shuffling import EpochOrder, Mixture, apportion, permutation

SIZES = [5, 0, 3, 8, 1, 4, 6]


def epoch(order: EpochOrder, number: int) -> list[tuple[int, int]]:
    return [order.locate(number * order.length + place) for place in range(order.length)]


@pytest.mark.parametrize("window", [1, 2, 3, 7, 100])
def test_an_epoch_sees_every_sequence_once(window: int) -> None:
    order = EpochOrder(SIZES, window, "0/0")
    everything = [(chunk, row) for chunk, size in enumerate(SIZES) for row in range(size)]
    for number in range(3):
        assert sorted(epoch(order, number)) == everything


def test_epochs_and_keys_differ() -> None:
    order = EpochOrder(SIZES, 2, "0/0")
    orders = [epoch(order, 0), epoch(order, 1), epoch(EpochOrder(SIZES, 2, "1/0"), 0)]
    assert orders[0] != orders[1] and orders[0] != orders[2]
    assert epoch(EpochOrder(SIZES, 2, "0/0"), 0) == orders[0]


def test_only_a_window_of_chunks_is_in_use_at_a_time() -> None:
    order = EpochOrder([10] * 12, 3, "0/0")
    for index in range(240):
        number, window = order.window_at(index)
        assert order.locate(index)[0] in order.chunks_of(number, window)
        assert window == index % 120 // 30 and number == index // 120
    assert order.chunks_of(0, 4) == order.chunks_of(1, 0)
    assert len({tuple(sorted(order.chunks_of(0, window))) for window in range(4)}) == 4


def test_order_does_not_depend_on_what_was_asked_before() -> None:
    order = EpochOrder(SIZES, 2, "seed")
    indices = np.random.default_rng(0).integers(0, 200, 100).tolist()
    fresh = {index: EpochOrder(SIZES, 2, "seed").locate(index) for index in set(indices)}
    assert [order.locate(index) for index in indices] == [fresh[index] for index in indices]
    assert pickle.loads(pickle.dumps(order)).locate(77) == order.locate(77)


def test_permutations_never_change() -> None:
    # Checkpoints depend on these: a change breaks every resume.
    assert permutation(8, 0, "a", 3).tolist() == [2, 4, 3, 6, 1, 0, 5, 7]
    order, mixture = EpochOrder(SIZES, 2, "0/0"), Mixture([1.0, 3.0], "0/mixture")
    assert [order.locate(index) for index in (0, 1, 30)] == [(3, 0), (2, 1), (6, 4)]
    assert [mixture.locate(position) for position in (0, 1, 2, 12345)] == [
        (1, 0),
        (1, 1),
        (0, 0),
        (0, 3110),
    ]


def test_mixture_draws_in_proportion_and_skips_nothing() -> None:
    mixture = Mixture([1.0, 2.0, 0.005], "0/mixture")
    draws = [mixture.locate(position) for position in range(30_000)]
    for source in range(3):
        indices = [index for drawn, index in draws if drawn == source]
        assert indices == list(range(len(indices)))
    shares = np.bincount([source for source, _ in draws]) / 30_000
    assert np.abs(shares - np.array([1.0, 2.0, 0.005]) / 3.005).max() < 1e-4
    # Also within a short stretch, not only over the whole.
    first = np.bincount([source for source, _ in draws[:300]], minlength=3)
    assert 70 < first[0] < 130
    for position in (0, 1, 9_999, 10_000, 12_345):
        counts = np.bincount([source for source, _ in draws[:position]], minlength=3)
        assert mixture.drawn(position) == counts.tolist()
    assert pickle.loads(pickle.dumps(mixture)).locate(12_345) == mixture.locate(12_345)


def test_one_source_is_drawn_in_order() -> None:
    mixture = Mixture([0.3], "0/mixture")
    assert mixture.locate(123_456) == (0, 123_456)
    assert mixture.drawn(123_456) == [123_456]


@pytest.mark.parametrize(
    ("total", "weights", "counts"),
    [
        (10, [1, 1], [5, 5]),
        (10, [2, 1], [7, 3]),
        (10, [1e6, 1], [9, 1]),
        (3, [5, 5, 5], [1, 1, 1]),
        (100, [0.5, 0.25, 0.25], [50, 25, 25]),
    ],
)
def test_apportion(total: int, weights: list[float], counts: list[int]) -> None:
    assert apportion(total, weights).tolist() == counts


def test_apportion_fewer_than_sources() -> None:
    counts = apportion(2, [1, 1, 1])
    assert counts.sum() == 2 and counts.min() == 0
