"""From nothing to a language model with mHC: text, training, a score, a sample.

The text is the source of Python's standard library, so there is nothing to download. The score is
bits per byte of held-out files, beside those of `xz -9` and of a trigram on the same bytes. Every
step but the score is a command of this package, printed before it runs.

    python recipes/quickstart/quickstart.py [key=value ...]

Overrides go to `fit`, `validate` and `generate`. Run again, it uses what it finds: the prepared
text if it is still the same, and the run, which it goes on with (`overwrite=true` begins anew).
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "shared"))

from bits import bits_per_byte, xz_bits_per_byte
from commands import run
from library_text import prepare_words
from trigram import Trigram

EXPERIMENT = "mhc_quickstart"
PROMPT = "def read_lines(path):\n"


@dataclass(frozen=True)
class HeldOut:
    """The validation text as `validate` measures it.

    Attributes:
        streams: Consecutive tokens of each chunk; every token but the first of each is predicted.
        end_of_document: The token that is no byte of text.
    """

    streams: list[np.ndarray]
    end_of_document: int

    @property
    def num_tokens(self) -> int:
        """Number of predicted tokens."""
        return sum(len(stream) - 1 for stream in self.streams)

    @property
    def text(self) -> bytes:
        """The predicted tokens that are bytes."""
        tokens = np.concatenate([stream[1:] for stream in self.streams])
        return tokens[tokens != self.end_of_document].astype(np.uint8).tobytes()


def held_out(data: Any) -> HeldOut:
    """All of the validation text of a `PreparedData` with the byte tokenizer."""
    chunks = [np.asarray(data.tokens(chunk), np.int64) for chunk in data.chunks("validation")]
    return HeldOut([chunk for chunk in chunks if len(chunk) > 1], data.tokenizer.end_of_document)


def trigram_bits_per_byte(data: Any, measured: HeldOut) -> float:
    """Bits per byte of a trigram that learned from the training text."""
    chunks = [np.asarray(data.tokens(chunk), np.int64) for chunk in data.chunks("train")]
    model = Trigram(np.concatenate(chunks))
    end = [measured.end_of_document]
    bits = sum(model.bits(np.concatenate([end, stream])) for stream in measured.streams)
    return bits / len(measured.text)


def score(folder: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    """Bits per byte of the model and of its two rivals, on the same bytes.

    Args:
        folder: The run's folder.
        metrics: What `validate --json` printed for it.
    """
    from mhc_lightning.data import PreparedData

    settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["data"]
    data = PreparedData(settings["path"])
    measured = held_out(data)
    assert metrics["val/tokens"] == measured.num_tokens
    text = measured.text
    return {
        "step": metrics["step"],
        "held_out_bytes": len(text),
        "bits_per_byte": {
            "model": bits_per_byte(metrics["val/loss"], measured.num_tokens, len(text)),
            "trigram": trigram_bits_per_byte(data, measured),
            "xz -9": xz_bits_per_byte(text),
        },
    }


def setting(overrides: list[str], name: str, default: str) -> str:
    """The value that an override gives, the last one winning."""
    values = [word.partition("=")[2] for word in overrides if word.startswith(f"{name}=")]
    return values[-1] if values else default


def main(overrides: list[str]) -> None:
    """Prepare, train, measure, generate, and say where to look."""
    began = time.monotonic()
    data_path = setting(overrides, "data.path", "data/quickstart")
    folder = Path(setting(overrides, "output_dir", f"runs/{EXPERIMENT}"))
    experiment = ["--config", EXPERIMENT]
    run(*prepare_words(EXPERIMENT, data_path))
    begun = (folder / "checkpoints" / "last").exists() and "overwrite=true" not in overrides
    trained = time.monotonic()
    run("fit", *experiment, *(["ckpt_path=last"] if begun else []), *overrides)
    trained = time.monotonic() - trained
    last = [*experiment, "ckpt_path=last", *overrides]
    printed = run("validate", *last, "--json", "data.validation_sequences=null", capture=True)
    results = score(folder, json.loads(printed)) | {"training_seconds": round(trained, 1)}
    (folder / "quickstart.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    run("generate", *last, f"prompt={PROMPT}", "max_new_tokens=300")

    print(f"\nbits per byte of {results['held_out_bytes']:,} bytes of held-out Python source")
    for name, bits in sorted(results["bits_per_byte"].items(), key=lambda pair: -pair[1]):
        print(f"  {name:<8} {bits:.3f}")
    print(
        f"\n{results['step']} steps, training {trained:.0f} s,"
        f" everything {time.monotonic() - began:.0f} s\n"
        f"watch the run:  {Path(sys.executable).parent / 'tensorboard'} --logdir {folder}\n"
        f"its files:      {folder} (metrics.csv, checkpoints, config.yaml, quickstart.json)"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
