"""`evaluate` on a checkpoint and on its export, and its refusals."""

import importlib.util
import json
from functools import partial

import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager

from mhc_lightning.data.tokenizers import ByteTokenizer
from mhc_lightning.evaluation import harness_tasks

LAST = ("output_dir=run", "ckpt_path=last")
CHOICES = [["the gain", "layer"], ["stream", "of the"], ["x", "y z"]]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with two tasks on local data, one that chooses and one that reads."""
    folder = tmp_path_factory.mktemp("tasks, = {1}")
    docs = [{"context": f"token {k}", "choices": c, "answer": k % 2} for k, c in enumerate(CHOICES)]
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, docs)))
    task = {
        "task": "local_choice",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "test.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "local_choice.yaml").write_text(yaml.safe_dump(task))
    reads = {
        "task": "local_text",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{context}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    del task["doc_to_choice"]
    (folder / "local_text.yaml").write_text(yaml.safe_dump({**task, **reads}))
    return folder, docs


@pytest.fixture(autouse=True)
def few_tasks(monkeypatch):
    """Leaves out the thousands of tasks of the harness itself, which take long to list."""
    monkeypatch.setattr(harness_tasks, "TaskManager", partial(TaskManager, include_defaults=False))


@pytest.fixture
def words(tasks):
    return (*LAST, "tasks=local_choice", f"include_path={tasks[0]}")


@torch.no_grad()
def direct_accuracy(model, docs):
    def score(context, continuation):
        tokens = torch.tensor(ByteTokenizer().encode(context + continuation).astype("int64"))
        logits = model(tokens[None, :-1])[0].double().log_softmax(-1)
        return logits.gather(1, tokens[1:, None])[-len(continuation.encode()) :].sum()

    right = 0
    for doc in docs:
        scores = [score(doc["context"], f" {choice}") for choice in doc["choices"]]
        right += int(torch.stack(scores).argmax()) == doc["answer"]
    return right / len(docs)


def test_a_local_task_on_a_checkpoint_and_on_its_export(trained, words, tasks, capfd, tmp_path):
    from mhc_lightning.interchange import load_exported

    assert trained.inside("evaluate", *words, "batch_size=2", "--json") == 0
    output, errors = capfd.readouterr()
    report = json.loads(output)
    assert "Traceback" not in errors
    assert trained.inside("export", *LAST, f"output={tmp_path / 'out'}") == 0
    expected = direct_accuracy(load_exported(tmp_path / "out"), tasks[1])
    assert report["results"]["local_choice"]["acc,none"] == expected
    assert report["step"] == 6 and report["tokenizer"] == "bytes-257"
    assert report["settings"]["max_length"] == 32 and report["settings"]["batch_size"] == 2
    file = trained.folder / "run/evaluation/step_00000006_local_choice.json"
    assert json.loads(file.read_text()) == report

    capfd.readouterr()
    exported = (f"ckpt_path={tmp_path / 'out'}", "data.path=nowhere", "limit=2")
    words = (*words, "tasks=[local_choice, local_text]", "trainer.precision=bf16-mixed")
    assert trained.inside("evaluate", *words, *exported, f"output_dir={tmp_path / 'new'}") == 0
    table, _ = capfd.readouterr()
    assert "local_choice" in table and "|acc" in table
    assert "bits_per_byte" in table and "N/A" in table
    (written,) = (tmp_path / "new/evaluation").iterdir()
    report = json.loads(written.read_text())
    assert report["n-samples"]["local_choice"]["effective"] == 2
    assert report["results"]["local_text"]["bits_per_byte_stderr,none"] is None


@pytest.mark.parametrize("memory", ["engram", "over_encoding"])
def test_a_model_with_a_memory(command, tasks, capfd, memory):
    from mhc_lightning.interchange import load_exported

    words = (f"memory={memory}", "memory.rows=301", "memory.num_heads=2", "memory.dim=8")
    more = ("callbacks=minimal", "optimizer.schedule=constant", "optimizer.lr=0.05")
    assert command.inside("fit", *words, *more, "output_dir=run") == 0
    assert command.inside("export", *words, *LAST, "output=out") == 0
    expected = direct_accuracy(load_exported(command.folder / "out"), tasks[1])
    asked = ("tasks=[local_choice, local_text]", f"include_path={tasks[0]}", "batch_size=2")
    found = []
    for form in (LAST, ("ckpt_path=out", "data.path=nowhere")):
        capfd.readouterr()
        assert command.inside("evaluate", *words, *form, *asked, "--json") == 0
        found.append(json.loads(capfd.readouterr()[0])["results"])
    assert found[0] == found[1]
    assert found[0]["local_choice"]["acc,none"] == expected


def last_error(code, capfd):
    _, errors = capfd.readouterr()
    assert code == 2, errors
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert last.startswith("error: ")
    return last


def test_without_the_harness_it_says_what_to_install(trained, words, capfd, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *_: None if name == "lm_eval" else find(name)
    )
    error = last_error(trained.inside("evaluate", *words), capfd)
    assert "the extra `evaluate`" in error and "pip install 'mhc-lightning[evaluate]'" in error


def test_a_tokenizer_mismatch_is_refused(trained, words, capfd, tmp_path):
    import tokenizers

    vocabulary = {chr(97 + k): k for k in range(26)} | {"[UNK]": 26, "<eos>": 27}
    other = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
    other.save(str(tmp_path / "tokenizer.json"))
    other_tokenizer = f"data.tokenizer={tmp_path / 'tokenizer.json'}"
    error = last_error(trained.inside("evaluate", *words, other_tokenizer), capfd)
    assert "tokenizer mismatch" in error and "bytes-257" in error


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["tasks="], "evaluate needs tasks="),
        (["ckpt_path=null"], "evaluate needs ckpt_path="),
        (["tasks=local_choise"], "did you mean 'local_choice'?"),
        (["include_path=no such, folder"], "no such, folder is no folder"),
        (["batch_size=0"], "evaluate.batch_size must be at least 1"),
        (["limit=0"], "evaluate.limit must be at least 1"),
        (["limit=few"], "evaluate.limit must be a whole number or null, not 'few'"),
        (["max_length=0"], "evaluate.max_length must be at least 1"),
        (["max_length=2"], "evaluate.max_length=9 or more"),
        (["model.vocab_size=300"], "model.embedding.weight is [257, 16], not [300, 16]"),
    ],
)
def test_mistakes_are_one_line(trained, words, capfd, more, expected):
    assert expected in last_error(trained.inside("evaluate", *words, *more), capfd)
