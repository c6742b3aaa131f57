import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from mhc_lightning.cli.main import main

DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "recipes/README.md",
    "recipes/downstream/README.md",
    "recipes/quickstart/README.md",
    "recipes/stability/README.md",
    "recipes/stress/README.md",
    "recipes/initialisation/README.md",
    "recipes/compute_scaling/README.md",
    "recipes/token_scaling/README.md",
]
TINY = [
    *("model.dim=32", "model.num_layers=1", "model.ffn_dim=32"),
    *("data.sequence_length=32", "data.batch_size=4", "data.num_workers=0"),
    "trainer.accelerator=cpu",
]
OVERRIDES = {
    "prepare": ["prepare.validation_fraction=0.2"],
    "fit": TINY,
    "validate": TINY,
    "inspect": [],
    "generate": [*TINY, "max_new_tokens=20"],
    "export": TINY,
    "import": TINY,
    "evaluate": [*TINY, "tasks=local", "include_path=tasks"],
    "report": [],
}
SCALED = "Train on many devices"
TESTED = ("Use it on your text", "Exchange and evaluate models", "The paper's models")


def python_in(repository: Path, section: str) -> str:
    text = (repository / "README.md").read_text(encoding="utf-8")
    text = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    (example,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return example


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
    (tmp_path / "tasks").mkdir()
    (tmp_path / "questions.jsonl").write_text('{"q": "Once upon a", "a": " time"}\n' * 3)
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "questions.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"max_gen_toks": 8, "until": []},
        "metric_list": [{"metric": "exact_match"}],
    }
    (tmp_path / "tasks/local.yaml").write_text(yaml.safe_dump(task))
    return tmp_path


def run_command(line: str, workplace: Path, *more: str) -> str:
    """Run one of README's commands, made small; what it prints."""
    program, *words = shlex.split(line)
    assert [program, *words[:2]] == ["python", "-m", "mhc_lightning"], line
    return run([sys.executable, *words, *OVERRIDES[words[2]], *more], workplace)


@pytest.mark.slow
def test_commands_on_ones_own_text(workplace, commands_in):
    fits = 0
    for line in commands_in("README.md", "Use it on your text"):
        program, *words = shlex.split(line)
        if program == "tensorboard":
            assert words == ["--logdir", "runs"]
            assert len(list(workplace.glob("runs/*/events.out.tfevents.*"))) >= 2
            run([str(Path(sys.executable).with_name(program)), *words, "--inspect"], workplace)
            continue
        command = words[2]
        fits += command == "fit"
        length = [f"trainer.max_steps={2 * fits}", "trainer.log_every_n_steps=1"]
        printed = run_command(line, workplace, *(length if command == "fit" else []))
        if command == "report":
            assert "wrote report/index.html" in printed
            assert "runs/mine_hc_again" in (workplace / "report/index.html").read_text()
        if command == "generate":
            assert printed.startswith("Once upon")
        if command == "validate":
            assert "val/loss" in printed
        if command == "inspect":
            assert "largest composite gain of sub-layers 0 to 1: forward 1.000" in printed
    assert fits == 4
    for name, steps in (("mine", 4), ("mine_hc", 6), ("watched", 8)):
        last = (workplace / "runs" / name / "checkpoints" / "last").resolve().name
        assert last.startswith(f"step_{steps:08}")


@pytest.mark.slow
def test_commands_on_exchange_and_evaluation(workplace, commands_in, repository):
    prepare, fit, *_ = commands_in("README.md", "Use it on your text")
    run_command(prepare, workplace)
    run_command(fit, workplace, "trainer.max_steps=2")
    export, again, evaluate = commands_in("README.md", "Exchange and evaluate models")
    run_command(export, workplace)
    run_command(again, workplace)
    assert (workplace / "runs/more/checkpoints/last").resolve().name == "step_00000000.ckpt"
    assert "exact_match" in run_command(evaluate, workplace)
    example = python_in(repository, "Exchange and evaluate models")
    show = "print(settings, sorted(tensors)[0])"
    printed = run([sys.executable, "-c", example + show], workplace)
    assert "hc_mult=4" in printed and "hc_head_base" in printed


def test_commands_on_the_papers_models(tmp_path, commands_in):
    lines = commands_in("README.md", "The paper's models")
    assert lines
    for line in lines:
        program, *words = shlex.split(line)
        assert [program, *words[:3]] == ["python", "-m", "mhc_lightning", "plan"], line
        printed = run([sys.executable, *words], tmp_path)
        assert "tokens/s" in printed or json.loads(printed)["parameters"]["total"] == 2972931976


def rounded(value: float, shown: str) -> str:
    """``value`` to as many significant digits as ``shown`` has, zeros before the point not."""
    digits = shown.replace(",", "").replace(".", "").lstrip("0")
    digits = digits if "." in shown else digits.rstrip("0")
    return f"{float(f'{value:.{len(digits)}g}'):,.{len(shown.partition('.')[2])}f}"


def test_the_table_is_what_plan_predicts(repository, capsys, tmp_path):
    def planned(name: str, machine: str) -> dict:
        given = ["plan", "--config", name, f"machine={machine}", "--json"]
        with contextlib.chdir(tmp_path):
            assert main(given) == 0
        return json.loads(capsys.readouterr().out)

    text = (repository / "README.md").read_text(encoding="utf-8")
    text = text.split("\n## The paper's models\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `mhc_(\w+)` \| (.*) \|$", text, flags=re.MULTILINE)
    assert len(rows) == 8
    units = {"B": 1e9, "M": 1e6, "days": 1, "hours": 1 / 24, "minutes": 1 / 24 / 60}
    for size, row in rows:
        total, active, machine, memory, speed, time = row.split(" | ")
        count, kind = re.match(r"(\d) × (H\d+)", machine).groups()
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


def test_python_example(repository):
    names: dict = {}
    exec(python_in(repository, "Use its parts in your own code"), names)
    assert names["residual"].shape == (2, 10, 4, 4)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_exist(document, commands_in, repository):
    lines = [line for line in commands_in(document) if line.startswith("make ")]
    for line in lines:
        run(["bash", "-c", line.replace("make ", "make --dry-run ", 1)], repository)


def test_the_commands_for_many_devices_make_layouts_that_fit(commands_in):
    """All but starting the processes."""
    from mhc_lightning.cli.arguments import parse_arguments
    from mhc_lightning.cli.components import build_model_for, build_trainer, check_layout, replicas
    from mhc_lightning.cli.composition import compose_experiment
    from mhc_lightning.cli.strategy_choice import resolve_strategy

    layouts, module = [], None
    for line in commands_in("README.md", SCALED):
        words = shlex.split(line.partition("mhc_lightning ")[2])
        if words[0] == "plan":  # run below
            continue
        experiment = compose_experiment(parse_arguments([*words, "trainer.accelerator=cpu"]))
        experiment, _ = resolve_strategy(experiment)
        trainer = build_trainer(experiment, logger=False, enable_checkpointing=False)
        module = module or build_model_for(experiment, trainer)
        data = experiment.config.data
        size = data.micro_batch_size or data.batch_size // replicas(trainer)
        settings: Any = SimpleNamespace(micro_batch_size=size)
        check_layout(trainer, module, settings)
        assert data.batch_size % (size * replicas(trainer)) == 0, line
        layouts.append((type(trainer.strategy).__name__, trainer.world_size, replicas(trainer)))
    assert layouts == [
        ("PipelineStrategy", 8, 2),
        ("PipelineStrategy", 8, 1),
        ("PipelineStrategy", 8, 1),
        ("PipelineStrategy", 32, 4),
    ]


def test_the_plan_of_a_pipeline_is_what_is_said_of_it(repository, commands_in, tmp_path):
    (line,) = [line for line in commands_in("README.md", SCALED) if " plan " in line]
    record = json.loads(run([sys.executable, *shlex.split(line)[1:], "--json"], tmp_path))
    assert (tmp_path / "pipeline.png").stat().st_size > 50_000
    text = (repository / "README.md").read_text(encoding="utf-8")
    text = " ".join(text.split(f"\n## {SCALED}\n")[1].split("\n## ")[0].split())
    said = re.search(r"take ([\d.]+)% to ([\d.]+)% longer .*?, and ([\d.]+)% to ([\d.]+)%", text)
    schedules = record["pipeline"]["schedules"].values()
    shown = [
        f"{100 * end(each[mode]['overhead_over_residual'] for each in schedules):.1f}"
        for mode in ("sequential", "overlapped")
        for end in (min, max)
    ]
    assert shown == list(said.groups())


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_is_of_a_kind_that_is_tested(document, commands_in):
    for line in commands_in(document):
        program = line.split()[0]
        if document == "README.md" and line in commands_in("README.md", SCALED):
            continue
        assert program in ("make", "python", "tensorboard", ".ci/run"), line
        if program == "python" and "mhc_lightning " in line.replace("dist/", ""):
            assert any(line in commands_in("README.md", section) for section in TESTED), line


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
