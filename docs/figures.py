"""The pictures of "What mHC is".

    python docs/figures.py            # draws them again, in seconds
    python docs/figures.py --train    # first trains the two networks of run.json again, in minutes

`mhc/figures/run.json` keeps what the pictures show of the two trained networks: 24 sub-layers of
`examples/vision_transformer.py`, once with HC and once with mHC, from the same seed.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from mhc_lightning.kernels import sinkhorn_knopp

HERE = Path(__file__).parent
FIGURES = HERE / "mhc" / "figures"
RUN = FIGURES / "run.json"

INK, FAINT, LINE = "#1c1e26", "#68707d", "#d9dde3"
HC, MHC, RESIDUAL = "#c2410c", "#0b6e99", "#68707d"
STYLE: Any = {
    "axes.edgecolor": "#aab0b9",
    "axes.grid": True,
    "axes.labelcolor": FAINT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "white",
    "font.size": 10,
    "grid.color": LINE,
    "lines.linewidth": 2,
    "svg.hashsalt": "mhc",
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
}

LOGITS = torch.tensor(  # a 4 x 4 matrix that is far from doubly stochastic
    [[2, -1, 0.5, 0], [0, 1.5, -0.5, 1], [-2, 0.25, 3, -1], [1, 0, -1.5, 0.75]],
    dtype=torch.float64,
)


# ---- diagrams


def box(axes: Axes, x: float, y: float, w: float, h: float, text: str, colour: str = INK) -> None:
    """A labelled box with its centre at (x, y)."""
    shape = FancyBboxPatch(
        (x - w / 2, y - h / 2),
        w,
        h,
        boxstyle="round,pad=0,rounding_size=0.08",
        facecolor="white",
        edgecolor=colour,
        linewidth=1.4,
        zorder=3,
    )
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", color=colour, zorder=4)


def arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    colour: str = FAINT,
    width: float = 1.4,
    bend: float = 0.0,
) -> None:
    """An arrow between two points."""
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=10,
            color=colour,
            linewidth=width,
            shrinkA=0,
            shrinkB=0,
            connectionstyle=f"arc3,rad={bend}",
            zorder=2,
        )
    )


def draw_streams() -> Figure:
    """A residual sub-layer beside a sub-layer with four streams."""
    figure = Figure(figsize=(6.0, 4.5))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.75))
    figure.subplots_adjust(left=0.01, right=0.99, top=0.9, bottom=0.01, wspace=0.02)
    for axes, title, width in ((left, "Residual connection", 3), (right, "Four streams", 5.25)):
        axes.set(xlim=(0, width), ylim=(0, 6.2))
        axes.axis("off")
        axes.set_title(title, fontsize=11, weight="bold", color=INK, loc="left", x=0.03)

    left.text(1, 5.9, "x", ha="center", style="italic")
    arrow(left, (1, 5.75), (1, 1.05))
    arrow(left, (1, 5.1), (2.2, 3.75), bend=-0.3)
    box(left, 2.2, 3.4, 1.1, 0.7, "sub-layer")
    arrow(left, (2.2, 3.05), (1.17, 0.87), bend=-0.3)
    box(left, 1, 0.85, 0.36, 0.36, "+", RESIDUAL)
    arrow(left, (1, 0.67), (1, 0.1))

    places = [0.5, 1.1, 1.7, 2.3]
    for k, x in enumerate(places):
        right.text(x, 5.9, f"$x_{k + 1}$", ha="center")
        arrow(right, (x, 5.75), (x, 2.42), MHC)
        arrow(right, (x, 5.45 - 0.1 * k), (3.07, 4.95), FAINT, 0.9, -0.12)
        arrow(right, (x, 1.58), (x, 1.05), MHC)
        box(right, x, 0.85, 0.36, 0.36, "+", RESIDUAL)
        arrow(right, (x, 0.67), (x, 0.1), MHC)
        arrow(right, (3.6, 1.9), (x + 0.19, 0.9), FAINT, 0.9, -0.16)
    box(right, 1.4, 2.0, 2.45, 0.8, "mix:  residual  [4 × 4]", MHC)
    box(right, 3.95, 4.95, 1.75, 0.62, "read:  pre  [4]", MHC)
    arrow(right, (3.95, 4.63), (3.95, 3.75))
    box(right, 3.95, 3.4, 1.1, 0.7, "sub-layer")
    arrow(right, (3.95, 3.05), (3.95, 2.34))
    box(right, 4.05, 2.0, 1.95, 0.62, "write:  post  [4]", MHC)
    return figure


# ---- numbers


def draw_sinkhorn() -> Figure:
    """Sinkhorn-Knopp on one matrix: the matrix after 0, 1, 2 and 20 iterations, and the error."""
    figure = Figure(figsize=(6.0, 7.6))
    grid = figure.add_gridspec(3, 2, height_ratios=(1, 1, 0.8), hspace=0.25, wspace=0.08)
    figure.subplots_adjust(left=0.09, right=0.98, top=0.96, bottom=0.07)
    matrices = [LOGITS.exp(), *(sinkhorn_knopp(LOGITS, t) for t in (1, 2, 20))]
    titles = ["exp of logits", "1 iteration", "2 iterations", "20 iterations"]
    for k, (matrix, title) in enumerate(zip(matrices, titles, strict=True)):
        axes = figure.add_subplot(grid[k // 2, k % 2])
        show_matrix(axes, matrix.numpy(), title)
    axes = figure.add_subplot(grid[2, :])
    counts = range(1, 31)
    columns, rows = [], []
    for t in counts:
        matrix = sinkhorn_knopp(LOGITS, t)
        columns.append(float((matrix.sum(0) - 1).abs().max()))
        rows.append(max(float((matrix.sum(1) - 1).abs().max()), 1e-16))
    axes.semilogy(counts, columns, color=HC, marker="o", markersize=4, label="columns")
    axes.semilogy(counts, rows, color=MHC, marker="s", markersize=4, label="rows")
    axes.axvline(20, color="#aab0b9", linewidth=1, linestyle=(0, (4, 3)))
    axes.text(20.3, 3e-2, "mHC stops here", color=FAINT)
    axes.text(8.5, 3e-2, "columns", color=HC)
    axes.text(8.5, 4e-15, "rows", color=MHC)
    axes.set(xlim=(0, 31), ylim=(1e-18, 2), xlabel="iterations")
    axes.set_title("Largest |sum − 1|", fontsize=10, loc="left", color=INK)
    axes.tick_params(length=0)
    return figure


def show_matrix(axes: Axes, matrix: np.ndarray, title: str) -> None:
    """A small matrix with its row sums and column sums."""
    n = len(matrix)
    axes.imshow(matrix, cmap="Blues", vmin=0, vmax=1.4)
    for i in range(n):
        for j in range(n):
            value = matrix[i, j]
            colour = "white" if value > 0.75 else INK
            axes.text(j, i, number(value), ha="center", va="center", fontsize=10, color=colour)
        axes.text(n, i, number(matrix[i].sum()), ha="center", va="center", fontsize=10, color=FAINT)
        axes.text(
            i, n, number(matrix[:, i].sum()), ha="center", va="center", fontsize=10, color=FAINT
        )
    axes.set(xlim=(-0.5, n + 0.5), ylim=(n + 0.5, -0.5), xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=10, color=INK, loc="left")


def number(value: float) -> str:
    """Two decimals below ten, none above."""
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def draw_gains() -> Figure:
    """Composite gains of the two trained networks over depth."""
    run = json.loads(RUN.read_text(encoding="utf-8"))
    figure = Figure(figsize=(6.0, 3.2))
    panels = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(left=0.09, right=0.98, top=0.84, bottom=0.17, wspace=0.1)
    for axes, direction in zip(panels, ("forward", "backward"), strict=True):
        for name, colour in (("hc", HC), ("mhc", MHC)):
            values = run[name]["gains"][f"amax_gain/composite/{direction}"]
            axes.semilogy(range(len(values)), values, color=colour)
        axes.axhline(1, color="#aab0b9", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.set_title(f"{direction}", fontsize=10, loc="left", color=INK)
        axes.set_xlabel("sub-layer")
        axes.tick_params(length=0)
    panels[0].set_ylim(0.6, 2000)
    panels[0].yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    panels[0].text(6, 60, "HC", color=HC, weight="bold")
    panels[0].text(14, 1.4, "mHC", color=MHC, weight="bold")
    figure.text(0.015, 0.94, "Composite Amax gain", weight="bold", fontsize=11)
    return figure


def draw_recompute() -> Figure:
    """Values per token that backward keeps, against the size of a block (eq. 20 of the paper)."""
    figure = Figure(figsize=(6.0, 3.0))
    axes = figure.subplots()
    figure.subplots_adjust(left=0.1, right=0.98, top=0.86, bottom=0.17)
    n, depth = 4, 60
    sizes = np.arange(1, 31)
    kept = n * np.ceil(depth / sizes) + (n + 2) * sizes
    best = int(kept.argmin())
    axes.plot(sizes, kept, color=MHC, marker="o", markersize=4)
    axes.axhline(n * depth, color=HC, linewidth=1.4, linestyle=(0, (4, 3)))
    axes.text(30, n * depth + 6, "without recomputation", ha="right", color=HC)
    axes.annotate(
        f"{kept[best]:.0f} at {sizes[best]} sub-layers",
        (sizes[best], kept[best]),
        (sizes[best] + 1.5, 32),
        color=MHC,
    )
    axes.set(ylim=(0, 275), xlabel="sub-layers per block", xlim=(0, 31))
    axes.set_title(
        "Stream values kept per token, in units of C (60 sub-layers, n = 4)",
        fontsize=10,
        loc="left",
        color=INK,
    )
    axes.tick_params(length=0)
    return figure


def draw_matrices() -> dict[str, np.ndarray]:
    """Heat maps of the two trained networks, by the callback's own function."""
    from mhc_lightning.plotting.matrix_heatmap import matrix_heatmap

    run = json.loads(RUN.read_text(encoding="utf-8"))
    pictures = {}
    for name, label in (("hc", "HC"), ("mhc", "mHC")):
        for kind, part in zip(("one", "product"), run[name]["matrices"], strict=True):
            title = f"{label}, {part['title']}"
            pictures[f"{name}_{kind}.png"] = matrix_heatmap(np.array(part["matrix"]), title, None)
    return pictures


# ---- the two trained networks


def train() -> dict[str, Any]:
    """Train both, and return their last gains and matrices."""
    sys.path.insert(0, str(HERE.parent / "examples"))
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader

    from mhc_lightning.callbacks import AmaxGain
    from mhc_lightning.modules import HyperConnection, ManifoldHyperConnection
    from vision_transformer import Classifier, VisionTransformer, gratings

    result: dict[str, Any] = {}
    for name, connection in (("hc", HyperConnection), ("mhc", ManifoldHyperConnection)):
        pl.seed_everything(0, verbose=False)
        network = VisionTransformer(connection, dim=16, blocks=12, num_streams=4)
        gains = AmaxGain(every_n_steps=200)
        trainer = pl.Trainer(
            max_steps=200,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            callbacks=[gains],
        )
        loader = DataLoader(gratings(4096, seed=0), batch_size=16, shuffle=True)
        trainer.fit(Classifier(network, lr=8e-3), loader)
        residuals: list[torch.Tensor] = []
        for layer in network.connections:
            window: Any = layer.window
            window.register_forward_hook(
                lambda *call, seen=residuals: seen.append(call[2].residual)
            )
        with torch.no_grad():
            network(gratings(1, seed=1).tensors[0])
        matrices = [residual[0, 0] for residual in residuals]  # of one token: [n, n]
        depth = len(matrices)
        shown = {
            "sub-layer 12": matrices[12],
            f"product of all {depth}": reduce(lambda product, matrix: matrix @ product, matrices),
        }
        result[name] = {
            "gains": {
                tag: [round(gains.last[f"{tag}/layer_{k}"], 4) for k in range(depth)]
                for tag in gains.peaks
            },
            "matrices": [
                {"title": title, "matrix": np.round(matrix.double().numpy(), 4).tolist()}
                for title, matrix in shown.items()
            ],
        }
    return result


FIGURE_OF: dict[str, Callable[[], Figure]] = {
    "streams.svg": draw_streams,
    "sinkhorn.svg": draw_sinkhorn,
    "gains.svg": draw_gains,
    "recompute.svg": draw_recompute,
}


def draw(folder: Path) -> None:
    """Write every picture to a folder."""
    from matplotlib import rc_context
    from matplotlib.image import imsave

    for name, make in FIGURE_OF.items():
        with rc_context(STYLE):
            make().savefig(folder / name, metadata={"Date": None})
    for name, image in draw_matrices().items():
        imsave(folder / name, image)


def main() -> None:
    """Draw, and train before if asked to."""
    parser = argparse.ArgumentParser(description="Draw the pictures of the pages on mHC.")
    parser.add_argument("--train", action="store_true", help="train the two networks first")
    if parser.parse_args().train:
        RUN.write_text(json.dumps(train(), indent=1) + "\n", encoding="utf-8")
    draw(FIGURES)


if __name__ == "__main__":
    main()
