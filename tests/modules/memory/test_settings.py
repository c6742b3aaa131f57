"""Settings of memories that make no sense are refused by one line that says what would."""

import re
from typing import Any

import numpy as np
import pytest
from in_process import run_main

from mhc_lightning.cli.arguments import parse_arguments
from mhc_lightning.cli.components import build_model
from mhc_lightning.cli.composition import compose_experiment
from mhc_lightning.errors import UserError
from mhc_lightning.modules import Engram, OverEncoding
from mhc_lightning.modules.memory.layout import spaced_layout

SIZES: dict[str, Any] = {"vocab_size": 257, "model_dim": 64, "num_layers": 3, "num_streams": 2}
HUGE = 10**30

# Setting, value, a part of the message.
OF_BOTH: list[tuple[str, Any, str]] = [
    ("orders", [], "at least one"),
    ("orders", [1, 2], "from 2 to 64"),
    ("orders", [2, -3], "from 2 to 64"),
    ("orders", [2, 65], "from 2 to 64"),
    ("orders", [2, HUGE], "from 2 to 64"),
    ("orders", [2, 2.5], "whole numbers"),
    ("orders", [2, None], "whole numbers"),
    ("orders", [2, "3"], "whole numbers"),
    ("orders", [True, 2], "whole numbers"),
    ("orders", "23", "whole numbers"),
    ("orders", 2, "whole numbers"),
    ("orders", [3, 2], "ascending"),
    ("orders", [2, 2], "different"),
    ("num_heads", 0, "from 1 to 1024, not 0"),
    ("num_heads", -1, "from 1 to 1024"),
    ("num_heads", HUGE, "from 1 to 1024"),
    ("num_heads", 1.5, "whole number"),
    ("num_heads", None, "not null"),
    ("num_heads", "8", "not '8'"),
    ("rows", 0, "whole number from 1"),
    ("rows", -5, "whole number from 1"),
    ("rows", 7, "use at least memory.rows=8"),
    ("rows", HUGE, "from 1 to 1099511627776"),
    ("rows", 100.0, "whole number"),
    ("rows", "many", "not 'many'"),
    ("rows", None, "not null"),
    ("dim", 0, "from 1"),
    ("dim", -8, "from 1"),
    ("dim", 7, "use a multiple of 4"),
    ("dim", 2, "use a multiple of 4"),
    ("dim", 8.0, "whole number"),
    ("dim", HUGE, "whole number"),
    ("dim", 2**44, "more than machines hold"),
    ("pad_token", -1, "from 0 to 256"),
    ("pad_token", 257, "from 0 to 256"),
    ("pad_token", "end", "not 'end'"),
    ("placement", "disk", "one of device, sharded, host"),
]
OF_ENGRAM: list[tuple[str, Any, str]] = [
    ("layers", [], "at least one"),
    ("layers", [3], "from 0 to 2"),
    ("layers", [-1, 0], "from 0 to 2"),
    ("layers", [1.0], "from 0 to 2"),
    ("layers", ["1"], "from 0 to 2"),
    ("layers", [False], "from 0 to 2"),
    ("layers", 1, "in brackets, not 1"),
    ("rows", [100], "one for each of the 2 orders"),
    ("rows", [100, 100, 100], "one for each of the 2 orders"),
    ("rows", [100, 7], "use at least memory.rows=8"),
    ("rows", [100, "7"], "not '7'"),
    ("conv_kernel", 0, "from 1 to 1024, not 0"),
    ("conv_kernel", -4, "from 1 to 1024"),
    ("conv_kernel", 10**9, "from 1 to 1024"),
    ("conv_kernel", 2.0, "whole number"),
    ("seed", -1, "from 0"),
    ("seed", 2**63, "from 0"),
    ("seed", None, "not null"),
    ("multipliers", [], "each of the 2 blocks, of 3 numbers"),
    ("multipliers", [1, 3, 5], "each of the 2 blocks, of 3 numbers"),
    ("multipliers", [[1, 3, 5]], "each of the 2 blocks, of 3 numbers"),
    ("multipliers", [[1, 3, 5], [1, 3]], "each of the 2 blocks, of 3 numbers"),
    ("multipliers", [[1, 3, 5], [1, 3, 5.5]], "whole numbers"),
    ("multipliers", [[1, 3, 5], [1, 3, 2**63]], "whole numbers"),
    ("multipliers", 7, "each of the 2 blocks, of 3 numbers"),
    ("multipliers", ["abc", "def"], "each of the 2 blocks, of 3 numbers"),
]
OF_OVER_ENCODING: list[tuple[str, Any, str]] = [
    ("rows", [1000, 1000], "whole number"),
    ("rows", 257 * 4, "a multiple of the 257 tokens"),
    ("word_scale", "half", "must be mean or full"),
]


def message(kind: type, **settings: Any) -> str:
    defaults = {"rows": 1000, "num_heads": 4}
    with pytest.raises(UserError) as error:
        kind(**SIZES, **{**defaults, **settings})
    text = str(error.value)
    assert "\n" not in text and len(text) < 300
    return text


@pytest.mark.parametrize(
    ("kind", "name", "value", "part"),
    [
        *((kind, *case) for kind in (Engram, OverEncoding) for case in OF_BOTH),
        *((Engram, *case) for case in OF_ENGRAM),
        *((OverEncoding, *case) for case in OF_OVER_ENCODING),
    ],
)
def test_a_value_out_of_range_is_refused(kind: type, name: str, value: Any, part: str) -> None:
    told = message(kind, **{name: value})
    assert f"memory.{name}" in told and part in told


def test_values_at_the_limits_are_taken() -> None:
    Engram(**SIZES, rows=8, num_heads=4, layers=[0, 2], dim=4, conv_kernel=1, pad_token=256)
    Engram(**SIZES, rows=[8, 9], num_heads=4, seed=2**63 - 1, layers=(2, 0, 2))
    Engram(**SIZES, rows=20, orders=[2, 64], multipliers=[[1] * 64, [-(2**63)] * 64])
    OverEncoding(**SIZES, rows=8, num_heads=4, pad_token=None)


def test_rows_that_would_overflow_a_polynomial_are_refused() -> None:
    with pytest.raises(UserError, match=r"too large to hash 10000000 tokens.*rows=(\d+)") as error:
        spaced_layout([2, 3], 4, 2**40, 10**7)
    most = int(str(error.value).rpartition("=")[2])
    layout = spaced_layout([2, 3], 4, most, 10**7)
    assert 3 * (10**7 - 1) * (layout.moduli[0][-1] - 1) < 2**63
    assert 3 * 10**7 * (layout.moduli[0][-1] + 20) > 2**63


@pytest.mark.parametrize(("vocab_size", "rows"), [(257, 1028), (40, 120), (9, 90), (8, 16)])
def test_the_rows_that_a_message_names_are_taken(vocab_size: int, rows: int) -> None:
    with pytest.raises(UserError, match=r"use memory\.rows=") as error:
        spaced_layout([2, 3], 4, rows, vocab_size)
    spaced_layout([2, 3], 4, int(str(error.value).rpartition("=")[2]), vocab_size)


def test_so_few_tokens_that_no_rows_will_do() -> None:
    with pytest.raises(UserError, match=r"use fewer memory\.num_heads$"):
        spaced_layout([2, 3], 4, 100, 5)


def test_a_pad_token_that_the_tokenizer_lacks_is_refused() -> None:
    memory = Engram(**SIZES, rows=100, pad_token=200)
    with pytest.raises(UserError, match=r"memory.pad_token=200 is no token .* 0 to 99"):
        memory.bind(np.arange(100), 3)


# On the command line: the lines are those above, or say the type that a setting takes.


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("memory=engram memory.layers=[9]", "memory.layers must be whole numbers from 0 to 3"),
        ("memory=engram memory.layers=1", "memory.layers must be a list or null, not 1"),
        ("memory=engram memory.orders=null", "memory.orders must be a list, not null"),
        ("memory=engram memory.rows=1e30", "memory.rows must be a whole number"),
        ("memory=engram memory.rows=[30,31,32]", "one for each of the 2 orders"),
        ("memory=engram memory.num_heads=2.5", "memory.num_heads must be a whole number, not 2.5"),
        ("memory=engram memory.dim=wide", "memory.dim must be a whole number or null"),
        ("memory=engram memory.zero_start=null", "memory.zero_start must be true or false"),
        ("memory=engram memory.multipliers=[1,2,3]", "each of the 1 blocks, of 3 numbers"),
        ("memory=engram memory.placement=cloud", "memory.placement must be one of device, sharded"),
        ("memory=over_encoding memory.word_scale=big", "must be one of mean, full"),
        ("memory=over_encoding memory.rows=[70,80]", "memory.rows must be a whole number"),
    ],
)
def test_values_on_the_command_line(words: str, part: str) -> None:
    arguments = ["plan", "--config", "mhc_quickstart", *words.split()]
    with pytest.raises(UserError, match=re.escape(part)):
        build_model(compose_experiment(parse_arguments(arguments)), on_meta=True)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("memory=engram memory.rows=3", "use at least memory.rows=16"),
        ("memory=engram memory.row=9", "did you mean 'memory.rows'"),
        ("memory=engramm", "engram_v41"),
        ("memory.rows=9", "memory.rows"),
    ],
)
def test_commands_end_with_one_line_and_code_2(words: str, part: str) -> None:
    _, errors = run_main("plan", "--config", "mhc_quickstart", *words.split(), code=2)
    (line,) = errors.strip().splitlines()
    assert line.startswith("error: ") and part in line
