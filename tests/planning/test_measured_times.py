"""Files of measured times: what is read, and what is refused."""

import json

import pytest

from mhc_lightning.errors import UserError
from mhc_lightning.planning import read_times
from mhc_lightning.planning.simulation import StageTimes

STAGE = {"forward": 1, "backward": 2.5}


def written(tmp_path, content):
    file = tmp_path / "times.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


def test_times_are_read(tmp_path):
    full = {**STAGE, "backward_weight": 1, "replay": 0.1, "merge_forward": 0.2}
    file = written(tmp_path, {"stages": [STAGE, full, STAGE], "transfers": [0.3, 0.4], "update": 2})
    times = read_times(file)
    assert times.stages[0] == StageTimes(1, 2.5)
    assert times.stages[1] == StageTimes(1, 2.5, 1, 0.1, 0.2, 0)
    assert times.transfers == (0.3, 0.4) and times.update == 2
    times.check(3)
    with pytest.raises(UserError, match="has 3 stages, but the layout has 4"):
        times.check(4)
    one = read_times(written(tmp_path, {"stages": [STAGE, STAGE], "transfers": 0.5}))
    assert one.transfers == (0.5,) and one.update is None
    assert read_times(written(tmp_path, {"stages": [STAGE]})).transfers == ()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "cannot be read"),
        ([STAGE], "it must be an object with stages"),
        ({"stages": [STAGE], "step": 1}, "it must be an object with stages"),
        ({"stages": []}, "stages must be a list"),
        ({"stages": STAGE}, "stages must be a list"),
        ({"stages": [STAGE, 3]}, r"stages\[1\] must be an object with forward, backward"),
        ({"stages": [{"forward": 1, "back": 2}]}, r"stages\[0\] must be an object"),
        ({"stages": [{"forward": 1}]}, r"stages\[0\] needs backward"),
        ({"stages": [{**STAGE, "forward": 0}]}, "needs forward, more than 0"),
        ({"stages": [{**STAGE, "replay": -1}]}, r"stages\[0\].replay must be seconds"),
        ({"stages": [{**STAGE, "replay": True}]}, "must be seconds, 0 or more, not True"),
        ('{"stages": [{"forward": 1, "backward": NaN}]}', "must be seconds"),
        ({"stages": [{**STAGE, "backward_weight": 3}]}, "longer than the 2.5 s that contain it"),
        ({"stages": [{**STAGE, "merge_forward": 1.5}]}, "longer than the 1 s that contain it"),
        ({"stages": [STAGE] * 3, "transfers": [1]}, "one number, or 2 for the boundaries"),
        ({"stages": [STAGE] * 2, "transfers": ["a"]}, "transfers must be seconds"),
        ({"stages": [STAGE], "update": "x"}, "update must be seconds"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(content, expected, tmp_path):
    with pytest.raises(UserError, match=expected):
        read_times(written(tmp_path, content))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.json cannot be read"):
        read_times(str(tmp_path / "nowhere.json"))
