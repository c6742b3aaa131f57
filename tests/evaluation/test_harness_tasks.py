"""Tasks are loaded by name, and give the numbers of a direct computation."""

import math
from functools import partial
from pathlib import Path

import lm_eval.tasks
import pytest
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager, _factory

from mhc_lightning.data.tokenizers import ByteTokenizer
from mhc_lightning.errors import UserError
from mhc_lightning.evaluation import harness_tasks
from mhc_lightning.evaluation.harness_model import HarnessModel
from mhc_lightning.evaluation.harness_tasks import load_tasks, run_tasks, task_manager

# Folders of the harness with the tasks of the group `paper`; to list all of them takes long.
PAPER_FOLDERS = (
    "bbh", "drop", "gsm8k", "hellaswag", "hendrycks_math", "mmlu", "piqa", "triviaqa",
)  # fmt: skip
LOCAL = ["local_choice", "local_continuation", "local_text"]


def prompt(examples, doc):
    shots = [f"Q: {e['question']}\nA: {e['choices'][e['answer']]}\n\n" for e in examples]
    return "".join(shots) + f"Q: {doc['question']}\nA:"


@pytest.fixture
def few_tasks(monkeypatch):
    """Leaves out the thousands of tasks of the harness itself, which take long to list."""
    monkeypatch.setattr(harness_tasks, "TaskManager", partial(TaskManager, include_defaults=False))


@pytest.fixture(scope="module")
def manager(local_tasks):
    return TaskManager(include_path=[harness_tasks.TASKS, local_tasks[0]], include_defaults=False)


@pytest.fixture(scope="module")
def report(network, manager):
    model = HarnessModel(network, ByteTokenizer(), batch_size=4, max_length=512)
    return run_tasks(model, load_tasks(manager, ["local_*"]))


def test_a_local_choice_gives_the_numbers_of_a_direct_computation(
    report, local_tasks, direct, encode
):
    _, train, test = local_tasks
    right = right_by_byte = 0
    for doc in test:
        context = encode(prompt(train, doc))
        scores = [direct(context, encode(f" {choice}"))[0] for choice in doc["choices"]]
        by_byte = [s / len(c) for s, c in zip(scores, doc["choices"], strict=True)]
        right += scores.index(max(scores)) == doc["answer"]
        right_by_byte += by_byte.index(max(by_byte)) == doc["answer"]
    found = report["results"]["local_choice"]
    assert found["acc,none"] == right / len(test)
    assert found["acc_norm,none"] == right_by_byte / len(test)
    assert report["n-shot"]["local_choice"] == 2
    assert report["n-samples"]["local_choice"]["effective"] == len(test)


def test_local_texts_have_the_bits_per_byte_of_a_direct_computation(
    report, local_tasks, direct, encode
):
    texts = [doc["text"] for doc in local_tasks[2]]
    total = sum(direct([256], encode(text))[0] for text in texts)
    bits = -total / math.log(2) / sum(len(text.encode()) for text in texts)
    assert report["results"]["local_text"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
    assert report["n-shot"]["local_text"] == 0


def test_local_continuations_are_compared_with_their_targets(
    network, manager, local_tasks, monkeypatch
):
    loaded = load_tasks(manager, ["local_continuation"])
    model = HarnessModel(network, ByteTokenizer(), batch_size=4, max_length=512)
    asked: list[str] = []

    def knows_two(requests):
        asked.extend(request.args[0] for request in requests)
        return ["yes", "2 of them", "the first", "???"]  # the second and the third are right

    monkeypatch.setattr(model, "generate_until", knows_two)
    found = run_tasks(model, loaded)
    assert found["results"]["local_continuation"]["exact_match,none"] == 0.5
    assert asked == [prompt(local_tasks[1], doc) for doc in local_tasks[2]]


def test_examples_and_documents_can_be_fewer(network, manager):
    model = HarnessModel(network, ByteTokenizer(), batch_size=4, max_length=40)
    loaded = load_tasks(manager, LOCAL)
    found = run_tasks(model, loaded, num_fewshot=1, limit=2)
    assert found["n-shot"] == {"local_choice": 1, "local_continuation": 1, "local_text": 1}
    assert {count["effective"] for count in found["n-samples"].values()} == {2}
    assert found["shortened"] == 2 * 3 + 2, "choices and prompts; texts are cut into windows"
    for settings in ({"limit": 0}, {"num_fewshot": -1}):
        (name,) = settings
        with pytest.raises(UserError, match=f"evaluate.{name}"):
            run_tasks(model, loaded, **settings)


def test_the_papers_group_has_its_eight_tasks_and_numbers_of_examples(monkeypatch):
    class Recorded(ConfigurableTask):  # which would fetch its data
        task_name = config = None

        def __init__(self, config):
            self.task_name, self.config = config["task"], config

    monkeypatch.setattr(_factory, "ConfigurableTask", Recorded)
    harness = Path(lm_eval.tasks.__file__).parent
    manager = TaskManager(
        include_path=[harness_tasks.TASKS, *(harness / folder for folder in PAPER_FOLDERS)],
        include_defaults=False,
    )
    loaded = load_tasks(manager, ["paper"])
    shots: dict[str, list[int]] = {}
    for name, task in loaded["tasks"].items():
        family = next(f for f in ("bbh", "hendrycks_math", "mmlu", name) if name.startswith(f))
        shots.setdefault(family, []).append(task.config["num_fewshot"])
    assert {family: set(numbers) for family, numbers in shots.items()} == {
        "bbh": {3},
        "drop": {3},
        "gsm8k_cot": {8},
        "hellaswag": {10},
        "hendrycks_math": {4},
        "mmlu": {5},
        "piqa": {0},
        "triviaqa": {5},
    }
    assert {family: len(numbers) for family, numbers in shots.items() if len(numbers) > 1} == {
        "bbh": 27,
        "hendrycks_math": 7,
        "mmlu": 57,
    }
    fixed = loaded["tasks"]["gsm8k_cot"].config["fewshot_config"]["samples"]
    assert len(fixed) == 8
    paper = loaded["groups"]["paper"]
    assert len(list(paper)) == 8 and len(paper.get_all_tasks()) == 27 + 7 + 57 + 5
    assert loaded["groups"]["mmlu"].has_aggregation


def test_unknown_tasks_and_data_out_of_reach_are_named(manager, few_tasks, local_tasks, tmp_path):
    with pytest.raises(UserError, match=r"no task 'local_choise'; did you mean 'local_choice'\?"):
        load_tasks(manager, ["local_choise"])
    with pytest.raises(UserError, match="nowhere is no folder"):
        task_manager(tmp_path / "nowhere")
    text = (local_tasks[0] / "local_choice.yaml").read_text()
    faults = {"no_data": ("test.jsonl", "gone.jsonl"), "no_output": ("multiple_choice", "guessing")}
    for name, fault in faults.items():
        broken = text.replace(*fault).replace("task: local_choice", f"task: {name}")
        (tmp_path / f"{name}.yaml").write_text(broken)
    manager = task_manager(tmp_path)
    for name in faults:
        with pytest.raises(UserError, match=f"cannot load {name}: "):
            load_tasks(manager, [name])
