"""The numbers that pages give are those that the commands beside them print."""

import json
import re

import pytest
from documents import DOCS, blocks
from in_process import run_main


def rounded(value: float, shown: str) -> str:
    """`value` to as many significant digits as `shown` has, zeros before the point not."""
    digits = shown.replace(",", "").replace(".", "").lstrip("0")
    digits = digits if "." in shown else digits.rstrip("0")
    return f"{float(f'{value:.{len(digits)}g}'):,.{len(shown.partition('.')[2])}f}"


@pytest.mark.parametrize(
    "sizes", [("10m",), pytest.param((), marks=pytest.mark.slow, id="all")], ids=str
)
def test_the_table_of_the_papers_models_is_what_plan_predicts(tmp_path, sizes):
    def planned(name: str, machine: str) -> dict:
        words = ("plan", "--config", name, f"machine={machine}", "--json")
        return json.loads(run_main(*words, folder=tmp_path)[0])

    text = (DOCS / "train/paper_models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `mhc_(\w+)` \| (.*) \|$", text, flags=re.MULTILINE)
    assert len(rows) == 8
    units = {"B": 1e9, "M": 1e6, "days": 1, "hours": 1 / 24, "minutes": 1 / 24 / 60}
    for size, row in rows:
        if sizes and size not in sizes:
            continue
        total, active, machine, memory, speed, time = row.split(" | ")
        parsed = re.match(r"(\d) × (H\d+)", machine)
        assert parsed is not None, row
        count, kind = parsed.groups()
        plans = [
            planned(f"{family}_{size}", f"{count}x{kind.lower()}")
            for family in ("mhc", "hc", "baseline")
        ]
        for shown, key in ((total, "total"), (active, "active")):
            number, unit = shown[:-1], shown[-1]
            assert rounded(plans[0]["parameters"][key] / units[unit], number) == number, row
        one, baseline = memory.split(", ")
        for shown, plan in zip((one, one, baseline), plans, strict=True):
            assert rounded(plan["memory_bytes_per_device"]["total"] / 2**30, shown) == shown, row
        assert rounded(plans[0]["tokens_per_second"], speed) == speed, row
        number, unit = time.split()
        assert rounded(plans[0]["days"] / units[unit], number) == number, row


def test_the_plan_of_a_pipeline_is_what_is_said_of_it(commands_in, tmp_path):
    (line,) = (line for line in commands_in("docs/train/plan.md") if "picture=" in line)
    words = line.partition("mhc_lightning ")[2].split()
    record = json.loads(run_main(*words, "--json", folder=tmp_path)[0])
    text = " ".join((DOCS / "train/plan.md").read_text(encoding="utf-8").split())
    assert (tmp_path / "pipeline.png").stat().st_size > 50_000
    said = re.search(r"take ([\d.]+)% to ([\d.]+)% longer .*?, and ([\d.]+)% to ([\d.]+)%", text)
    schedules = record["pipeline"]["schedules"].values()
    shown = [
        f"{100 * end(each[mode]['overhead_over_residual'] for each in schedules):.1f}"
        for mode in ("sequential", "overlapped")
        for end in (min, max)
    ]
    assert said is not None and shown == list(said.groups())


def test_readmes_python_example():
    (example,) = blocks("README.md", "python")
    names: dict = {}
    exec(example, names)
    assert names["residual"].shape == (2, 10, 4, 4)


def test_the_table_of_connections_counts_their_parameters():
    from math import factorial

    from mhc_lightning.modules import (
        HyperConnection,
        IdentityHyperConnection,
        KroneckerHyperConnection,
        ManifoldHyperConnection,
        PermutationHyperConnection,
        SinglePassHyperConnection,
    )

    def count(kind: type, **settings: object) -> int:
        connection = kind(dim=width, num_streams=n, layer_index=1, **settings)
        return sum(parameter.numel() for parameter in connection.parameters())

    text = (DOCS / "train/connections.md").read_text(encoding="utf-8")
    width, n = 6, 4
    kept = {
        ManifoldHyperConnection: n**2 + 2 * n,
        SinglePassHyperConnection: n**2 + 2 * n,
        PermutationHyperConnection: factorial(n) + 2 * n,
        KroneckerHyperConnection: 2 * factorial(2) + 2 * n,
        IdentityHyperConnection: 2 * n,
    }
    for kind, coefficients in kept.items():
        assert count(kind) == coefficients * (n * width + 1) + 3, kind
    ks = dict.fromkeys(kept.values())
    assert f"at n = 4, K is {', '.join(map(str, list(ks)[:-1]))} and {list(ks)[-1]}" in text
    assert count(HyperConnection) == width * (n + 2) + n**2 + 2 * n + 2
