"""What `inspect` prints and draws: a table, a JSON object, pictures."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhc_lightning.callbacks.gains import GAIN_TAGS
from mhc_lightning.cli.text_table import text_table
from mhc_lightning.errors import UserError
from mhc_lightning.formatting import format_gain
from mhc_lightning.inspection import Inspection
from mhc_lightning.plotting.gain_profile import gain_profile
from mhc_lightning.plotting.matrix_heatmap import matrix_heatmap

if TYPE_CHECKING:
    import numpy as np

    from mhc_lightning.cli.inspected_checkpoint import InspectedCheckpoint
    from mhc_lightning.inspection import NgramGate

_HEADER = (
    *("", "sub-layer", "forward", "backward", "composite fwd", "composite bwd"),
    *("column error", "diagonal", "reads stream"),
)
_NGRAMS = 10  # in the table of a block


def as_text(checkpoint: "InspectedCheckpoint", inspection: Inspection) -> str:
    """A table of the sub-layers, a line for the largest composite gains, and tables of n-grams."""
    rows: list[tuple[str, ...]] = [_HEADER]
    for k, name in enumerate(inspection.names):
        gains = [format_gain(inspection.gains[tag][k]) for tag in GAIN_TAGS]
        stream, share = _read_most(inspection, k)
        error, diagonal = inspection.column_error[k], inspection.diagonal[k]
        most = f"{stream + 1} ({share:.0%})"
        rows.append((str(k), name, *gains, f"{error:.1e}", f"{diagonal:.3f}", most))
    table = text_table(rows, "rl" + "r" * (len(_HEADER) - 2))
    lines = [_title(checkpoint), "", table, "", *_summaries(inspection)]
    for block, ngrams in checkpoint.gates.items():
        lines += ["", *_ngrams_as_text(block, ngrams)]
    return "\n".join(lines)


def as_json(checkpoint: "InspectedCheckpoint", inspection: Inspection) -> dict[str, Any]:
    """Everything, matrices included."""
    layers = []
    for k, name in enumerate(inspection.names):
        gains = [inspection.gains[tag][k] for tag in GAIN_TAGS]
        layers.append(
            {
                "name": name,
                "single": {"forward": gains[0], "backward": gains[1]},
                "composite": {"forward": gains[2], "backward": gains[3]},
                "row_error": inspection.row_error[k],
                "column_error": inspection.column_error[k],
                "diagonal_mean": inspection.diagonal[k],
                "read": inspection.read[k].tolist(),
                "write": inspection.write[k].tolist(),
                "residual": inspection.matrices[k].tolist(),
            }
        )
    report = {
        "checkpoint": str(checkpoint.path),
        "matrices": "static" if checkpoint.tokens is None else "text",
        "step": checkpoint.step,
        "tokens": checkpoint.tokens,
        "sub_layers": layers,
        "composites": [
            {"first": span.start, "last": span.stop - 1, "residual": product.tolist()}
            for span, product in inspection.composites.items()
        ],
    }
    if checkpoint.gates:
        report["gates"] = [
            {
                "block": block,
                "ngrams": [
                    {
                        "text": text,
                        "tokens": ngram.tokens,
                        "positions": ngram.positions,
                        "gate": ngram.gate,
                        "streams": ngram.streams.tolist(),
                    }
                    for ngram, text in ngrams
                ],
            }
            for block, ngrams in checkpoint.gates.items()
        ]
    return report


def draw(checkpoint: "InspectedCheckpoint", inspection: Inspection, folder: Path) -> int:
    """Draw the gains, every matrix and the products of all into a folder; how many pictures.

    Raises:
        UserError: the folder cannot be written to.
    """
    kind = "static" if checkpoint.tokens is None else "mean"
    pictures: dict[str, np.ndarray] = {"gains": gain_profile(inspection.gains, checkpoint.step)}
    digits = len(str(len(inspection.names) - 1))
    for k, (name, matrix) in enumerate(zip(inspection.names, inspection.matrices, strict=True)):
        title = f"Sub-layer {k}, {kind}: {name}"
        pictures[f"layer_{k:0{digits}d}"] = _heatmap(matrix, title, checkpoint.step)
    for span, product in inspection.composites.items():
        title = f"Sub-layers {span.start} to {span.stop - 1}, product, {kind}"
        name = f"composite_{span.start}_to_{span.stop - 1}"
        pictures[name] = _heatmap(product, title, checkpoint.step)

    from matplotlib.image import imsave

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            imsave(folder / f"{name}.png", picture)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
    return len(pictures)


def _ngrams_as_text(block: int, ngrams: "list[tuple[NgramGate, str]]") -> list[str]:
    """The n-grams that open a block's gate most, as a table below a line."""
    total = sum(ngram.positions for ngram, _ in ngrams)
    mean = sum(ngram.gate * ngram.positions for ngram, _ in ngrams) / total
    rows: list[tuple[str, ...]] = [("n-gram", "gate", "positions", "opens to stream")]
    for ngram, text in ngrams[:_NGRAMS]:
        stream = int(ngram.streams.argmax())
        most = f"{stream + 1} ({float(ngram.streams[stream]):.3f})"
        # Quoted: spaces and line ends count.
        rows.append(
            (json.dumps(text, ensure_ascii=False), f"{ngram.gate:.3f}", str(ngram.positions), most)
        )
    most_open = f"what opens it most, of {len(ngrams)} n-grams"
    return [
        f"memory of block {block}: mean gate {mean:.3f}; {most_open}",
        "",
        text_table(rows, "lrrr"),
    ]


def _heatmap(matrix: Any, title: str, step: int | None) -> "np.ndarray":
    return matrix_heatmap(matrix.double().numpy(), title, step)


def _title(checkpoint: "InspectedCheckpoint") -> str:
    step = "" if checkpoint.step is None else f", step {checkpoint.step:,}"
    what = (
        "static matrices, of the biases alone"
        if checkpoint.tokens is None
        else f"matrices on {checkpoint.tokens} tokens of the text, gains averaged over them"
    )
    return f"{checkpoint.path}{step}: {what}"


def _summaries(inspection: Inspection) -> list[str]:
    """A line for every stretch of sub-layers that can be multiplied."""
    lines = []
    for span in inspection.composites:
        parts = []
        for direction in ("forward", "backward"):
            gains = inspection.gains[f"amax_gain/composite/{direction}"]
            layer = max(span, key=lambda k, gains=gains: _rank(gains[k]))  # type: ignore[misc]
            parts.append(f"{direction} {format_gain(gains[layer])} (sub-layer {layer})")
        where = f"sub-layers {span.start} to {span.stop - 1}"
        lines.append(f"largest composite gain of {where}: {', '.join(parts)}")
    return lines


def _rank(gain: float) -> float:
    return gain if gain == gain else float("inf")  # NaN is the largest


def _read_most(inspection: Inspection, k: int) -> tuple[int, float]:
    read = inspection.read[k].abs()
    most = int(read.argmax())
    return most, float(read[most] / read.sum())
