import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

DOCUMENTS = ["README.md", "CONTRIBUTING.md", "recipes/README.md", "recipes/quickstart/README.md"]
TINY = [
    *("model.dim=32", "model.num_layers=1", "model.ffn_dim=32"),
    *("data.sequence_length=32", "data.batch_size=4", "data.num_workers=0"),
    "trainer.accelerator=cpu",
]
OVERRIDES = {
    "prepare": ["prepare.validation_fraction=0.2"],
    "fit": TINY,
    "validate": TINY,
    "generate": [*TINY, "max_new_tokens=20"],
}


def run(command: list[str], cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def workplace(tmp_path) -> Path:
    """A folder with the texts that README's commands begin with."""
    (tmp_path / "my_texts").mkdir()
    for number in range(40):
        text = f"Once upon a time there were {number} streams.\n" * 40
        (tmp_path / "my_texts" / f"{number}.txt").write_text(text)
    return tmp_path


def test_commands_on_ones_own_text(workplace, commands_in):
    fits = 0
    for line in commands_in("README.md", "Use it on your text"):
        program, *words = shlex.split(line)
        if program == "tensorboard":
            assert words == ["--logdir", "runs"]
            assert len(list(workplace.glob("runs/*/events.out.tfevents.*"))) >= 2
            run([str(Path(sys.executable).with_name(program)), *words, "--inspect"], workplace)
            continue
        assert [program, *words[:2]] == ["python", "-m", "mhc_lightning"], line
        command = words[2]
        fits += command == "fit"
        length = [f"trainer.max_steps={2 * fits}"] if command == "fit" else []
        printed = run([sys.executable, *words, *OVERRIDES[command], *length], workplace)
        if command == "generate":
            assert printed.startswith("Once upon")
        if command == "validate":
            assert "val/loss" in printed
    assert fits == 3
    for name, steps in (("mine", 4), ("mine_hc", 6)):
        last = (workplace / "runs" / name / "checkpoints" / "last").resolve().name
        assert last.startswith(f"step_{steps:08}")


def test_commands_on_the_papers_models(tmp_path, commands_in):
    lines = commands_in("README.md", "The paper's models")
    assert lines
    for line in lines:
        program, *words = shlex.split(line)
        assert [program, *words[:3]] == ["python", "-m", "mhc_lightning", "plan"], line
        printed = run([sys.executable, *words], tmp_path)
        assert "tokens/s" in printed or json.loads(printed)["parameters"]["total"] == 2972931976


def test_python_examples(repository):
    text = (repository / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert examples
    for example in examples:
        names: dict = {}
        exec(example, names)
        assert names["residual"].shape == (2, 10, 4, 4)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_exist(document, commands_in, repository):
    lines = [line for line in commands_in(document) if line.startswith("make ")]
    for line in lines:
        run(["bash", "-c", line.replace("make ", "make --dry-run ", 1)], repository)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_is_of_a_kind_that_is_tested(document, commands_in):
    for line in commands_in(document):
        program = line.split()[0]
        assert program in ("make", "python", "tensorboard", ".ci/run"), line
        if program == "python" and "mhc_lightning " in line.replace("dist/", ""):
            tested = ("Use it on your text", "The paper's models")
            assert any(line in commands_in("README.md", section) for section in tested), line


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document, repository):
    text = (repository / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (repository / document).parent.joinpath(target).exists(), target


@pytest.mark.slow
def test_quickstart_in_a_fresh_environment_beats_the_trigram(copy_of_repository, commands_in):
    assert commands_in("README.md", "Try it") == ["make quickstart", "make test"]
    printed = run(["make", "quickstart"], copy_of_repository)
    results = json.loads(
        (copy_of_repository / "runs/mhc_quickstart/quickstart.json").read_text(encoding="utf-8")
    )
    bits = results["bits_per_byte"]
    assert bits["model"] < bits["trigram"]
    for name, value in bits.items():
        assert re.search(rf"^ +{name} +{value:.3f}$", printed, re.MULTILINE)
    assert "--logdir runs/mhc_quickstart" in printed
