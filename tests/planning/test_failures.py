"""The formulas of failures, against going through a run."""

import random

import pytest

from mhc_lightning.planning.failures import Failures


def test_the_rate_is_that_of_llama_3():
    assert Failures().per_day(16384) * 54 == pytest.approx(419)
    assert Failures().per_day(8) < 0.01


def test_storage_limits_many_nodes_and_nodes_limit_few():
    failures = Failures(node_storage=2e9, storage=10e9)
    assert failures.checkpoint_seconds(20_000_000_000, 1) == 10
    assert failures.checkpoint_seconds(20_000_000_000, 4) == 2.5
    assert failures.checkpoint_seconds(20_000_000_000, 500) == 2


def test_the_interval_is_the_best_one():
    failures, devices, checkpoint = Failures(), 4096, 20.0

    def lost(interval: float) -> float:
        often = failures.per_day(devices) / 86400
        return checkpoint / interval + often * (failures.restart_seconds + interval / 2)

    best = failures.interval(devices, checkpoint)
    assert lost(best) == pytest.approx(failures.lost(devices, checkpoint))
    assert lost(best) <= min(lost(best * factor) for factor in (0.5, 0.9, 1.1, 2.0))


def test_the_share_lost_is_what_a_run_with_failures_loses():
    failures, devices, checkpoint = Failures(per_device_day=0.004), 1000, 30.0
    interval, rate = failures.interval(devices, checkpoint), failures.per_day(devices) / 86400
    generator, clock, useful, fails = random.Random(0), 0.0, 0.0, 0.0
    fails = generator.expovariate(rate)
    while useful < 20_000 * interval:
        end = clock + interval + checkpoint
        if fails < end:
            clock = fails + failures.restart_seconds
            fails = clock + generator.expovariate(rate)
        else:
            clock, useful = end, useful + interval
    # Young's formula leaves out failures while restarting, and terms of second order.
    assert 1 - useful / clock == pytest.approx(failures.lost(devices, checkpoint), rel=0.12)
