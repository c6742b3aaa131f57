"""The pages with commands: README, docs, recipes; and the folder that their commands begin in."""

import json
import re
from contextlib import chdir
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
RECIPES = sorted(
    path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob("recipes/*/README.md")
)
PAGES = sorted(path.relative_to(REPOSITORY).as_posix() for path in DOCS.rglob("*.md"))
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "recipes/README.md", *RECIPES, *PAGES]

# Pages whose commands are run one after another, in one folder. README's are among them.
IN_ORDER = [
    "docs/start/first_run.md",
    "docs/start/what_you_see.md",
    "docs/train/data.md",
    "docs/train/documents.md",
    "docs/train/conversations.md",
    "docs/train/configuration.md",
    "docs/train/resume.md",
    "docs/train/watch.md",
    "docs/train/report.md",
    "docs/train/exchange.md",
    "docs/train/huggingface.md",
    "docs/train/paper_models.md",
    "docs/train/memory.md",
]
# Commands for more devices than there are: their layouts are built.
LAYOUTS = ["docs/train/many_devices.md", "docs/train/slurm_and_torchrun.md"]


def blocks(document: str, info: str) -> list[str]:
    """The blocks of code of a document that begin with ``` and this."""
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    return re.findall(rf"^```{re.escape(info)}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def write_inputs(folder: Path) -> None:
    """Write what the pages' commands read: texts, a table, a tokenizer, a task, experiments."""
    (folder / "my_texts" / "drafts").mkdir(parents=True)
    for number in range(40):
        text = f"Once upon a time there were {number} streams.\n" * 40
        (folder / "my_texts" / f"{number}.txt").write_text(text)
    (folder / "my_texts" / "drafts" / "none.txt").write_text("A draft.\n")
    (folder / "my_tables").mkdir()
    for number in range(20):
        rows = "".join(f"{row},{row * number}\n" for row in range(50))
        (folder / "my_tables" / f"{number}.csv").write_text(f"stream,gain\n{rows}")
    (folder / "my_articles").mkdir()
    articles = [{"title": f"Stream {n}", "meta": {"body": "It mixes. " * 9}} for n in range(40)]
    (folder / "my_articles" / "all.json").write_text(json.dumps(articles))
    pairs = [{"prompt": f"{n} streams and {n} are ", "completion": f"{2 * n}."} for n in range(200)]
    (folder / "my_chats.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    _write_tokenizer(folder / "my_tokenizer" / "tokenizer.json")
    _write_task(folder)
    for page, name in (("data", "mixed.yaml"), ("configuration", "mine.yaml")):
        (experiment,) = blocks(f"docs/train/{page}.md", f'yaml title="{name}"')
        (folder / name).write_text(experiment)
    (script,) = blocks("docs/train/data.md", 'python title="tokens.py"')
    with chdir(folder):
        exec(script, {})


def _write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<|endoftext|>", "[UNK]", "Once", "upon", "a", "time", "streams", "."]
    model = models.WordLevel({word: number for number, word in enumerate(words)}, "[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(words[:1])
    path.parent.mkdir()
    tokenizer.save(str(path))


def _write_task(folder: Path) -> None:
    (folder / "tasks").mkdir()
    (folder / "questions.jsonl").write_text('{"q": "Once upon a", "a": " time"}\n' * 3)
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "questions.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"max_gen_toks": 8, "until": []},
        "metric_list": [{"metric": "exact_match"}],
    }
    (folder / "tasks" / "local.yaml").write_text(yaml.safe_dump(task))


def json_keys(path: Path) -> set[str]:
    """The keys at the top of a JSON file."""
    return set(json.loads(path.read_text(encoding="utf-8")))
