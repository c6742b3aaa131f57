"""The table of Lightning's features: a probe for every row, and the page made of them."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from networks import tiny_transformer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mhc_lightning import LanguageModel, TextDataModule
from mhc_lightning.data import prepare
from mhc_lightning.optimizers.recipes import AdamWRecipe

SECTIONS = (
    "How long a fit is",
    "Data",
    "Validate, test, predict",
    "Tuner",
    "Callbacks",
    "Precision and gradients",
    "Checkpoints",
    "Profilers and checks",
    "Processes",
)


class Probe(NamedTuple):
    """One row.

    Attributes:
        run: Raises where the feature does not work, or gives other numbers than it should.
        raises: The kind and part of the text of the error that one gets; None where it works.
        note: What else to know.
        slow: True if it takes longer than a quick test may.
    """

    run: Callable[[], None]
    raises: tuple[type[Exception], str] | None
    note: str
    slow: bool


PROBES: dict[tuple[str, str], Probe] = {}


def probe(
    section: str,
    feature: str,
    raises: tuple[type[Exception], str] | None = None,
    note: str = "",
    slow: bool = False,
) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Make a function the proof of one row."""
    assert section in SECTIONS and (section, feature) not in PROBES

    def register(run: Callable[[], None]) -> Callable[[], None]:
        PROBES[section, feature] = Probe(run, raises, note, slow)
        return run

    return register


def rendered_page() -> str:
    """The page, of what the probes declare."""
    lines = [
        "# Lightning's features",
        "",
        "After this page you know what of Lightning works with `LanguageModel` and",
        "`TextDataModule`, and what does not, and why.",
        "",
        "Each row is proved by a test of `tests/test_lightning_features.py`, with a tiny network",
        "on a CPU: *works* says that the numbers are those that the feature promises, worked out",
        "another way. This page is written by",
        '`WRITE_DOCS=1 make test ARGS="tests/test_lightning_features.py"`. [Train with your own',
        "Trainer](trainer.md) has programs that use them.",
    ]
    for section in SECTIONS:
        lines += ["", f"## {section}", "", "| | |", "|---|---|"]
        for (of, feature), found in PROBES.items():
            if of == section:
                says = "works"
                if found.raises is not None:
                    says = f"`{found.raises[0].__name__}: {found.raises[1]}`"
                lines.append(f"| {feature} | {says}{found.note and '; ' + found.note} |")
    return "\n".join(lines) + "\n"


# What the probes are made of.


class Recorder(DummyLogger):
    """Keeps what a logger is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append(metrics)

    def series(self, tag: str) -> list[float]:
        return [row[tag] for row in self.rows if tag in row]


class Batches(pl.Callback):
    """Keeps the batches of training, and the epoch of each."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.epochs: list[int] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.seen.append(batch.clone())
        self.epochs.append(trainer.current_epoch)


def network(**changes: Any) -> Any:
    return tiny_transformer(**{"num_experts": 0, "num_streams": 2, **changes})


def model(vocab_size: int = 40, **recipe: Any) -> LanguageModel:
    return LanguageModel(
        network(vocab_size=vocab_size),
        AdamWRecipe(**{"lr": 1e-2, "warmup_steps": 2, "schedule": "cosine", **recipe}),
    )


def text_model(**recipe: Any) -> LanguageModel:
    return model(vocab_size=257, **recipe)


def loader(batches: int = 6, size: int = 2, seed: int = 1) -> DataLoader:
    tokens = torch.randint(
        0, 40, (batches * size, 9), generator=torch.Generator().manual_seed(seed)
    )
    return DataLoader(tokens, batch_size=size)  # type: ignore[arg-type]


@functools.cache
def _prepared() -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory()
    texts = Path(folder.name) / "texts"
    texts.mkdir()
    for number in range(12):
        (texts / f"{number}.txt").write_text(f"{number} streams of {number**5} words\n" * 4)
    prepare(texts, Path(folder.name) / "data", validation_fraction=0.25, progress=False)
    return folder


def text_data(**changes: Any) -> TextDataModule:
    settings = {"batch_size": 4, "micro_batch_size": 2, "sequence_length": 16}
    return TextDataModule(Path(_prepared().name) / "data", **{**settings, **changes})


def trainer(**options: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            "max_steps": -1 if "max_epochs" in options else 4,
            "accelerator": "cpu",
            "devices": 1,
            "logger": Recorder(),
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": tempfile.gettempdir(),
            **options,
        }
    )


def fit(module: Any = None, data: Any = None, validation: Any = None, **options: Any) -> pl.Trainer:
    """A trainer after its fit: of a tiny model on six batches of two sequences, by default."""
    run, module = trainer(**options), model() if module is None else module
    if isinstance(data, TextDataModule):
        run.fit(module, datamodule=data)
    else:
        run.fit(module, loader() if data is None else data, validation)
    return run


def series(run: pl.Trainer, tag: str) -> list[float]:
    assert isinstance(run.logger, Recorder)
    return run.logger.series(tag)


def losses(run: pl.Trainer) -> list[float]:
    return series(run, "train/loss")


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=name)


def log_likelihoods(module: LanguageModel, batch: Tensor) -> Tensor:
    """Of each sequence, in float64 and from its logits."""
    logits = module(batch[:, :-1].clamp(min=0)).double()
    each = nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
    return -each.sum(dim=-1)
