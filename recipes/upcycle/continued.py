"""One variant of the recipe: its runs, and what is read from them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from gaps import Estimate, estimate
from untouched import Untouched
from variants import Variant

from mhc_lightning.callbacks.gains import GAIN_TAGS
from mhc_lightning.reporting.logged_runs import LoggedRun
from mhc_lightning.reporting.metric_series import layer_matrix


@dataclass(frozen=True)
class Continued:
    """What became of the pretrained model with one connection.

    Attributes:
        variant: How it was trained on.
        runs: By seed; those whose loss stopped being finite are left out.
        before: What the pretrained model says of the same batches, by seed.
        diverged: Seeds that are left out.
    """

    variant: Variant
    runs: dict[int, LoggedRun]
    before: dict[int, Untouched]
    diverged: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The variant's."""
        return self.variant.name

    def held_out(self) -> dict[int, dict[int, float]]:
        """Held-out loss by seed and step; step 0 is the pretrained model's."""
        return {
            seed: {0: self.before[seed].held_out, **_by_step(run, "val/loss")}
            for seed, run in self.runs.items()
        }

    def ends(self) -> dict[int, float]:
        """Held-out loss at the end, by seed."""
        return {seed: losses[max(losses)] for seed, losses in self.held_out().items()}

    def training(self) -> dict[int, np.ndarray]:
        """Training loss of each step minus the pretrained model's on the same batch, by seed."""
        found = {}
        for seed, run in self.runs.items():
            losses = _by_step(run, "train/loss")
            own = np.array([losses[step] for step in sorted(losses)])
            found[seed] = own - np.array(self.before[seed].training)[: len(own)]
        return found

    def last_third(self) -> dict[int, float]:
        """The mean of `training` over the last third of the steps, by seed."""
        return {
            seed: float(v[-max(1, len(v) // 3) :].mean()) for seed, v in self.training().items()
        }

    def first_difference(self) -> float:
        """The largest difference from the pretrained model's loss before the first update."""
        return max(abs(float(values[0])) for values in self.training().values())

    def largest_gains(self) -> dict[str, float]:
        """The largest of each gain, of all sub-layers, samples and seeds."""
        return {
            tag.removeprefix("amax_gain/"): max(
                float(run.scalars[tag].values.max()) for run in self.runs.values()
            )
            for tag in GAIN_TAGS
        }

    def over_time(self, tag: str) -> dict[int, float]:
        """A number by step, the mean over seeds."""
        series = [_by_step(run, tag) for run in self.runs.values()]
        return {step: float(np.mean([one[step] for one in series])) for step in series[0]}

    def by_layer(self, tag: str, sample: int = -1) -> np.ndarray:
        """A number by sub-layer [L], the mean over seeds.

        Args:
            tag: Its tag.
            sample: Which; the first (0) is before any update if it is taken at step 1.
        """
        matrices = [layer_matrix(run.scalars, tag)[2] for run in self.runs.values()]
        return np.asarray(np.mean([values[:, sample] for values in matrices], axis=0))

    def weights(self, what: str, sample: int = -1) -> np.ndarray:
        """Read or write weights of the streams by sub-layer, [n, L], the mean over seeds."""
        prefix = f"{what}/stream_"
        run = next(iter(self.runs.values()))
        streams = {
            tag.removeprefix(prefix).split("/")[0] for tag in run.scalars if tag.startswith(prefix)
        }
        return np.stack([self.by_layer(f"{prefix}{i}", sample) for i in range(len(streams))])


def minus(one: Continued, other: Continued | None, what: str) -> Estimate | None:
    """Differences in pairs of the same seed, the mean with its interval.

    Args:
        one: The variant.
        other: What it is compared with; None for nothing.
        what: `ends` or `last_third`.
    """
    if other is None or other is one:
        return None
    mine, theirs = getattr(one, what)(), getattr(other, what)()
    return estimate(value - theirs[seed] for seed, value in mine.items() if seed in theirs)


def described(one: Continued, baseline: Continued | None) -> dict[str, Any]:
    """A variant's results as plain values."""
    about = {**asdict(one.variant), "diverged_seeds": one.diverged}
    if not one.runs:
        return about
    gained = estimate(end - one.before[seed].held_out for seed, end in one.ends().items())
    return {
        **about,
        "held_out_loss": one.held_out(),
        "held_out_minus_untouched": _plain(gained),
        "held_out_minus_residual": _plain(minus(one, baseline, "ends")),
        "training_minus_untouched": {s: v.tolist() for s, v in one.training().items()},
        "last_third_minus_untouched": _plain(estimate(one.last_third().values())),
        "last_third_minus_residual": _plain(minus(one, baseline, "last_third")),
        "difference_before_the_first_update": one.first_difference(),
        "largest_gains": one.largest_gains(),
        "diversity_by_step": one.over_time("stream_diversity/mean"),
        "diversity_by_layer": one.by_layer("stream_diversity").tolist(),
        "read_weights": {
            "first": one.weights("read", 0).T.tolist(),
            "last": one.weights("read").T.tolist(),
        },
        "write_weights": {
            "first": one.weights("write", 0).T.tolist(),
            "last": one.weights("write").T.tolist(),
        },
        "read_spread": one.by_layer("read_spread").tolist(),
        "write_spread": one.by_layer("write_spread").tolist(),
        "kept": one.by_layer("kept").tolist(),
    }


def moved(one: Continued, what: str) -> float:
    """The mean size of the change of read or write weights since the first step."""
    return float(np.abs(one.weights(what) - one.weights(what, 0)).mean())


def table(found: Sequence[Continued], baseline: Continued | None) -> str:
    """The result as text."""
    lines = [
        "variant                      held out  minus untouched    minus residual (95%)"
        "         diversity  gain    reads   writes"
    ]
    for one in found:
        if not one.runs:
            lines.append(f"{one.name:27}  diverged")
            continue
        ends = list(one.ends().values())
        gained = float(np.mean([end - one.before[s].held_out for s, end in one.ends().items()]))
        diversity = list(one.over_time("stream_diversity/mean").values())[-1]
        gap = minus(one, baseline, "ends")
        lines.append(
            f"{one.name:27}{float(np.mean(ends)):10.4f}{gained:+17.4f}"
            f"    {'' if gap is None else gap.text():27}{diversity:10.4f}"
            f"{one.largest_gains()['composite/backward']:8.2f}"
            f"{moved(one, 'read'):9.4f}{moved(one, 'write'):9.4f}"
        )
    return "\n".join(lines)


def _by_step(run: LoggedRun, tag: str) -> dict[int, float]:
    series = run.scalars[tag]
    return dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))


def _plain(found: Estimate | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)
