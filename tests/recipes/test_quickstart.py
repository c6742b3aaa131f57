"""The quickstart: its commands, and what it prints."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from trigram import Trigram

import quickstart

END = 256


class Prepared:
    """A prepared folder's tokens, as `PreparedData` gives them."""

    tokenizer = SimpleNamespace(end_of_document=END)

    def __init__(self, train: list[list[int]], validation: list[list[int]]) -> None:
        self.splits = {"train": train, "validation": validation}

    def chunks(self, split: str) -> list[list[int]]:
        return self.splits[split]

    def tokens(self, chunk: list[int]) -> np.ndarray:
        return np.array(chunk, np.uint16)


def test_held_out_text_is_all_but_the_first_token_of_each_chunk():
    data = Prepared([], [[*b"abcdefgh", END, *b"ij"], [*b"k"], [*b"lmnopq"]])
    measured = quickstart.held_out(data)
    assert measured.text == b"bcdefghij" + b"mnopq"
    assert measured.num_tokens == 10 + 5


def test_trigram_learns_from_the_training_text_and_pays_for_the_predicted_tokens():
    train = [[*b"the theatre", END], [*b"there then", END]]
    data = Prepared(train, [[*b"the thermos", END]])
    measured = quickstart.held_out(data)
    model = Trigram(np.array(train[0] + train[1]))
    whole = np.array([END, *b"the thermos", END])
    expected = model.bits(whole) / len(b"he thermos")
    assert quickstart.trigram_bits_per_byte(data, measured) == pytest.approx(expected)


def test_the_last_override_counts():
    overrides = ["output_dir=a", "output_dir_of=b", "output_dir=c=d"]
    assert quickstart.setting(overrides, "output_dir", "default") == "c=d"
    assert quickstart.setting(overrides, "data.path", "default") == "default"


@pytest.mark.slow
def test_half_its_steps_beat_the_trigram(tmp_path, repository):
    script = repository / "recipes/quickstart/quickstart.py"
    done = subprocess.run(
        [sys.executable, str(script), "trainer.max_steps=600"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    results = json.loads((tmp_path / "runs/mhc_quickstart/quickstart.json").read_text())
    bits = results["bits_per_byte"]
    assert bits["model"] < bits["trigram"]
    for name, value in bits.items():
        assert re.search(rf"^ +{name} +{value:.3f}$", done.stdout, re.MULTILINE)
    assert "--logdir runs/mhc_quickstart" in done.stdout


@pytest.mark.slow
def test_a_second_call_goes_on_where_the_first_stopped(tmp_path, repository):
    script = repository / "recipes/quickstart/quickstart.py"
    tiny = ["model.dim=32", "model.num_layers=1", "data.sequence_length=64"]
    scores = []
    for steps in (10, 40):
        done = subprocess.run(
            [sys.executable, str(script), *tiny, f"trainer.max_steps={steps}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        results = json.loads((tmp_path / "runs/mhc_quickstart/quickstart.json").read_text())
        assert results["step"] == steps
        scores.append(results["bits_per_byte"])
    assert "was prepared already" in done.stdout
    assert "fit --config mhc_quickstart ckpt_path=last" in done.stdout
    assert scores[1]["model"] < scores[0]["model"]
    assert scores[1]["trigram"] == scores[0]["trigram"]


def test_a_failed_command_ends_it_with_its_exit_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        quickstart.run("fit", "--config", "no_such_experiment")
    assert stopped.value.code == 2
