"""Control of updates: a learning rate that is lowered, and rises back."""

import pytest

from mhc_lightning.callbacks.alarm.update_control import LoweredRate
from mhc_lightning.errors import UserError


def test_a_rate_is_lowered_and_comes_back():
    rate = LoweredRate(0.5, 10)
    assert rate.scale(1) == rate.scale(100) == 1.0
    rate.lower(100)
    assert [rate.scale(s) for s in (100, 101, 105, 110, 500)] == [0.5, 0.55, 0.75, 1.0, 1.0]
    rate.lower(105)  # from where it is
    assert rate.scale(105) == 0.375
    for step in range(106, 130):
        rate.lower(step)
    assert rate.scale(129) == pytest.approx(0.1)  # not into nothing
    stays = LoweredRate(0.5, None)
    stays.lower(3)
    assert stays.scale(10**6) == 0.5


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: LoweredRate(1.0, 10), "lr_factor"),
        (lambda: LoweredRate(0.5, 0), "lr_recovery_steps"),
    ],
)
def test_settings_out_of_range_are_refused(make, word):
    with pytest.raises(UserError, match=word):
        make()
