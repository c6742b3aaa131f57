"""Benchmark scores of models: the rows of a table, beside the paper's."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MODELS = ("residual", "hc", "mhc")
BASELINE = MODELS[0]
PAPER_GROUP = "paper"
PAPER_SOURCE = (
    "Table 4 of arXiv 2512.24880 (its models of 27B parameters, 262B tokens; its prompts are not"
    " published)"
)


@dataclass(frozen=True)
class Published:
    """A benchmark in the paper.

    Attributes:
        name: What it is called there.
        shots: Examples before each question.
        percent: Scores of the baseline, HC and mHC, in the order of `MODELS`.
    """

    name: str
    shots: int
    percent: tuple[float, float, float]

    @property
    def scores(self) -> dict[str, float]:
        """By model, as fractions of 1."""
        return {name: round(p / 100, 3) for name, p in zip(MODELS, self.percent, strict=True)}


# By the harness's task, and of its metrics and filters the one that is compared.
PAPER = {
    ("bbh_cot_fewshot", "exact_match,get-answer"): Published("BBH", 3, (43.8, 48.9, 51.0)),
    ("drop", "f1,none"): Published("DROP", 3, (47.0, 51.6, 53.9)),
    ("gsm8k_cot", "exact_match,strict-match"): Published("GSM8K", 8, (46.7, 53.2, 53.8)),
    ("hellaswag", "acc_norm,none"): Published("HellaSwag", 10, (73.7, 74.3, 74.7)),
    ("hendrycks_math", "exact_match,none"): Published("MATH", 4, (22.0, 26.4, 26.0)),
    ("mmlu", "acc,none"): Published("MMLU", 5, (59.0, 63.0, 63.4)),
    ("piqa", "acc_norm,none"): Published("PIQA", 0, (78.5, 79.9, 80.5)),
    ("triviaqa", "exact_match,remove_whitespace"): Published("TriviaQA", 5, (54.3, 56.3, 57.6)),
}


@dataclass(frozen=True)
class Score:
    """A number with its standard error.

    Attributes:
        value: In the metric's unit; None if it was not finite.
        error: In the same unit; None if the harness has none.
    """

    value: float | None
    error: float | None

    def minus(self, other: "Score") -> "Score":
        """The difference; its error is that of two independent scores."""
        if self.value is None or other.value is None:
            return Score(None, None)
        known = self.error is not None and other.error is not None
        error = math.hypot(self.error or 0.0, other.error or 0.0) if known else None
        return Score(self.value - other.value, error)

    def __str__(self) -> str:
        if self.value is None:
            return "not finite"
        return _number(self.value) + ("" if self.error is None else f" ± {_number(self.error)}")


@dataclass(frozen=True)
class Row:
    """One metric of one benchmark.

    Attributes:
        task: The harness's task or group.
        metric: Its metric and filter, as in ``exact_match,get-answer``.
        shots: Examples before each question; None if that differs within a group.
        higher_is_better: None if the harness does not say.
        scores: By model.
        paper: The paper's, if this is its benchmark with its number of examples.
    """

    task: str
    metric: str
    shots: int | None
    higher_is_better: bool | None
    scores: dict[str, Score]
    paper: Published | None

    @property
    def label(self) -> str:
        """The benchmark's name."""
        return self.task if self.paper is None else self.paper.name

    @property
    def unit(self) -> str:
        """The metric, its filter if it has one, and which way is better."""
        metric, _, chosen = self.metric.partition(",")
        way = {True: " ↑", False: " ↓", None: ""}[self.higher_is_better]
        return metric + ("" if chosen == "none" else f" ({chosen})") + way

    @property
    def differences(self) -> dict[str, Score]:
        """To the baseline, by model; none if the baseline was not evaluated."""
        if BASELINE not in self.scores:
            return {}
        base = self.scores[BASELINE]
        return {name: s.minus(base) for name, s in self.scores.items() if name != BASELINE}


def rows_of(reports: Mapping[str, dict[str, Any]]) -> list[Row]:
    """Rows of what was asked for: of groups with a score that, of others their members.

    Args:
        reports: What `evaluate --json` printed, by model; of the same tasks.
    """
    first = next(iter(reports.values()))
    members = first["group_subtasks"]
    inner = {name for names in members.values() for name in names}
    of_paper = set(members.get(PAPER_GROUP, ()))
    rows = []
    for root in (name for name in {**first["results"], **members} if name not in inner):
        for task in _scored(root, first):
            metrics = _metrics(first["results"][task])
            papers = [metric for metric in metrics if (task, metric) in PAPER and task in of_paper]
            for metric in papers or metrics:
                rows.append(_row(task, metric, reports, bool(papers)))
    return rows


def _row(task: str, metric: str, reports: Mapping[str, dict[str, Any]], of_paper: bool) -> Row:
    report = next(iter(reports.values()))
    name, _, chosen = metric.partition(",")
    shots = {report["n-shot"].get(leaf) for leaf in _leaves(task, report["group_subtasks"])}
    shot = shots.pop() if len(shots) == 1 else None
    published = PAPER[task, metric] if of_paper else None
    scores = {
        model: Score(
            found["results"][task].get(metric),
            found["results"][task].get(f"{name}_stderr,{chosen}"),
        )
        for model, found in reports.items()
    }
    higher = report["higher_is_better"].get(task, {}).get(name)
    same = published is not None and published.shots == shot
    return Row(task, metric, shot, higher, scores, published if same else None)


def _metrics(results: Mapping[str, Any]) -> list[str]:
    return [key for key in results if "," in key and "_stderr," not in key]


def _scored(name: str, report: Mapping[str, Any]) -> Iterator[str]:
    if _metrics(report["results"].get(name, {})):
        yield name
    else:
        for member in report["group_subtasks"].get(name, ()):
            yield from _scored(member, report)


def _leaves(name: str, members: Mapping[str, Sequence[str]]) -> Iterator[str]:
    if name not in members:
        yield name
    for member in members.get(name, ()):
        yield from _leaves(member, members)


def markdown(rows: Sequence[Row]) -> str:
    """The table; with the paper's columns if a row has them."""
    models = list(rows[0].scores)
    compared = list(rows[0].differences)
    published = any(row.paper for row in rows)
    titles = ["benchmark", "shots", "metric", *models]
    titles += [f"{name} − {BASELINE}" for name in compared]
    titles += [f"paper, 27B: {name}" for name in models] if published else []
    lines = [titles, ["---"] * len(titles)]
    for row in rows:
        paper = row.paper.scores if row.paper else {}
        task = row.task if row.label == row.task else f"{row.label} ({row.task})"
        cells = [task, "mixed" if row.shots is None else str(row.shots), row.unit]
        cells += [str(row.scores[name]) for name in models]
        cells += [_signed(row.differences[name]) for name in compared]
        cells += [_number(paper[name]) if paper else "" for name in models] if published else []
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def as_records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The scores as plain values, for JSON."""
    return [
        {
            "benchmark": row.label,
            "task": row.task,
            "metric": row.metric,
            "shots": row.shots,
            "higher_is_better": row.higher_is_better,
            "scores": {name: vars(score) for name, score in row.scores.items()},
            f"minus_{BASELINE}": {name: vars(score) for name, score in row.differences.items()},
            "paper_27b": row.paper.scores if row.paper else None,
        }
        for row in rows
    ]


def _number(value: float) -> str:
    text = f"{value:.3f}" if abs(value) < 1000 else f"{value:.4g}"
    return text.replace("-", "−")


def _signed(score: Score) -> str:
    return ("+" if score.value is not None and score.value >= 0 else "") + str(score)
