"""What is fitted to the parts' losses, and what the papers print beside them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from gaps import Estimate, Line, estimate, fit_logarithm
from parts import EQUAL_FLOPS, MEMORIES
from trained import Trained

PAPER: dict[str, dict[str, Any]] = {
    "allocation": {
        "source": "arXiv 2601.07372: 9.9 billion parameters, 993 million of them active",
        "best_share": [0.75, 0.80],
        "gap_at_best": -0.0139,
        "at_share_0.4": "about the loss of experts alone",
    },
    "scaling": {
        "source": "arXiv 2601.07372: 3B, 258 thousand to 10 million slots; arXiv 2501.16975: 1.3B",
        "engram": "a straight line in log10(slots), its slope not printed",
        "over_encoding_slope": -0.0256,
    },
    "where": {
        "source": "arXiv 2601.07372: 12 blocks, 3 billion parameters, 1.6 billion of Engram",
        "gaps_by_depth": [[1 / 11, 1.770 - 1.808], [10 / 11, 1.783 - 1.808]],
        "gap_of_two_blocks": 1.768 - 1.808,
    },
    "what_for": {
        "source": "arXiv 2601.07372: Engram-27B and MoE-27B, 26.7 billion parameters each",
        "engram_minus_experts": 1.622 - 1.634,
    },
    "connections": {"source": "arXiv 2601.07372 trains with mHC alone; nothing to compare with"},
}
"""What the papers have, in nats per token; depth is block / (blocks - 1), from 0 to 1."""


def described(part: str, found: Sequence[Trained]) -> dict[str, Any]:
    """What a part says beyond its losses, for the JSON."""
    if part == "allocation":
        return described_valley(found)
    if part == "scaling":
        lines = row_lines(found)
        form = "value + slope * log10(rows per head / centre)"
        return {
            "form": form,
            "fits": {name: None if line is None else asdict(line) for name, line in lines.items()},
        }
    if part == "what_for":
        return {"engram_minus": minus(found, "engram")}
    return {}


def row_lines(found: Sequence[Trained]) -> dict[str, Line | None]:
    """Straight lines in log10(rows per head) through each memory's losses."""
    lines = {}
    for memory in MEMORIES:
        own = [one for one in found if one.variant.name.startswith(f"{memory} ")]
        sizes = [one.variant.place or 0.0 for one in own]
        lines[memory] = fit_logarithm(memory, sizes, [one.losses for one in own])
    return lines


def described_valley(found: Sequence[Trained]) -> dict[str, Any]:
    """Whether the losses over shares have a lowest point inside, and where.

    A parabola is fitted for each seed. The comparison of the ends with the best share has chosen
    that share from the same losses, so it is a little too kind to a valley.
    """
    best = min((one for one in found if one.losses), key=lambda one: one.mean, default=None)
    if best is None:
        return {"best_share": None}
    ends = [found[0], found[-1]]
    gaps = [estimate(_paired(end, best)) for end in ends]
    inside = best not in ends
    lowest = parabolas(found)
    return {
        "best_share": best.variant.place,
        "first_and_last_minus_best": [gap and asdict(gap) for gap in gaps],
        "valley": inside and all(g is not None and (g.low or 0.0) > 0 for g in gaps),
        "parabolas": {
            "seeds_with_a_minimum_inside": list(lowest),
            "lowest_share": _as_dict(estimate(lowest.values())),
        },
    }


def parabolas(found: Sequence[Trained]) -> dict[int, float]:
    """The lowest share of a parabola through each seed's losses, where it opens upwards and inside.

    Only seeds with a loss at every share count.
    """
    shares = [one.variant.place or 0.0 for one in found]
    seeds = [s for s in found[0].losses if all(s in one.losses for one in found)]
    lowest = {}
    for seed in seeds:
        square, slope, _ = np.polyfit(shares, [one.losses[seed] for one in found], 2)
        place = -slope / (2 * square) if square > 0 else float("nan")
        if min(shares) < place < max(shares):
            lowest[seed] = float(place)
    return lowest


def minus(found: Sequence[Trained], name: str) -> dict[str, Any]:
    """One variant's losses minus those of the others, after equal tokens and equal FLOPs.

    A variant without runs of its own at equal FLOPs costs as much as the baseline.
    """
    own = {one.variant.name: one for one in found}
    others = [other for other in own if other != name and not other.endswith(EQUAL_FLOPS)]
    return {
        account: {
            other: _as_dict(estimate(_paired(at(own, name, ending), at(own, other, ending))))
            for other in others
        }
        for account, ending in (("equal_tokens", ""), ("equal_flops", EQUAL_FLOPS))
    }


def at(own: Mapping[str, Trained], name: str, ending: str) -> Trained:
    """A variant's runs of this ending, or the ones without it."""
    return own.get(f"{name}{ending}", own[name])


def _paired(one: Trained, other: Trained) -> list[float]:
    return [loss - other.losses[seed] for seed, loss in one.losses.items() if seed in other.losses]


def _as_dict(found: Estimate | None) -> Mapping[str, Any] | None:
    return None if found is None else asdict(found)
