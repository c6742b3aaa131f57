"""Parts of pages that are written from the code when the site is built.

A page marks the place with a comment, `<!-- generated: NAME -->`.
"""

import re
import sys
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))

from messages import Message, messages, without_labels

_MARK = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
NOTES = Path(__file__).with_name("message_notes.yaml")

# The subjects of the messages, by the folder or file that makes them.
_SUBJECTS = {
    "cli": "Command line and configuration",
    "data": "Data and `prepare`",
    "checkpoints": "Checkpoints",
    "files": "Files",
    "language_model.py": "Training",
    "held_out_steps.py": "Training",
    "trainer_checks.py": "Training",
    "optimizers": "Optimizer",
    "callbacks": "Instruments and alarm",
    "loggers": "Loggers",
    "modules": "Model and connections",
    "upcycling": "Upcycling",
    "kernels": "Kernels",
    "strategies": "Many devices",
    "planning": "Planning and pipelines",
    "generation.py": "Generation",
    "evaluation": "Evaluation",
    "interchange": "Export, import, DeepSeek-V4",
    "huggingface": "Hugging Face",
    "reporting": "Reports",
    "_torchvision.py": "Installation",
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the marked places of a page, and colour commands, which stand without a prompt."""
    markdown = _MARK.sub(lambda found: _PARTS[found[1]](), markdown)
    return re.sub(r"^( *```)console$", r"\1bash", markdown, flags=re.MULTILINE)


def command_line() -> str:
    """The texts of `--help`, of the program and of each command."""
    from mhc_lightning.cli.commands import COMMANDS
    from mhc_lightning.cli.help import command_help, overall_help

    parts = ["## All commands", _block(overall_help())]
    for command in COMMANDS.values():
        parts += [f"## {command.name}", _block(command_help(command))]
    return "\n\n".join(parts)


def settings_tables() -> str:
    """Every configuration key: a table for each file of a group."""
    from mhc_lightning.cli.settings_reference import settings

    parts: list[str] = []
    group = ""
    for file, rows in groupby(settings(), key=lambda setting: setting.file):
        if file.partition("/")[0] != group:
            group = file.partition("/")[0]
            parts.append(f"## {'The run' if group == 'run' else group}")
        if group != "run":
            parts.append(f"### {group}={Path(file).stem}")
        lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
        for row in rows:
            meaning = re.sub(r"[*<|]", r"\\\g<0>", row.meaning)
            default = row.default.replace("|", "\\|")
            lines.append(f"| `{row.key}` | {row.type} | `{default}` | {meaning} |")
        parts.append("\n".join(lines))
    return '<div class="settings" markdown>\n\n' + "\n\n".join(parts) + "\n\n</div>"


def error_messages() -> str:
    """Every message, by subject and source file, with its cause where that is known."""
    notes = yaml.safe_load(NOTES.read_text(encoding="utf-8"))
    parts: list[str] = []
    found = sorted(messages(), key=lambda message: (_rank(message.file), message.file))
    for subject, of_subject in groupby(found, key=lambda message: _subject(message.file)):
        parts.append(f"## {subject}")
        for file, of_file in groupby(of_subject, key=lambda message: message.file):
            title = Path(file).stem.strip("_").replace("_", " ").capitalize()
            if "/" in file:
                parts.append(f"### {title} {{ data-toc-label='{title}' }}")
            parts.append("\n".join(_entries(file, list(of_file), notes)))
    return "\n\n".join(parts)


def _entries(file: str, found: list[Message], notes: dict[str, Any]) -> Iterator[str]:
    for text in dict.fromkeys(message.text for message in found if message.is_readable):
        yield from _entry(text, notes["causes"])
    for text in notes["elsewhere"].get(file, []):
        yield from _entry(text, notes["causes"])


def _entry(text: str, causes: list[dict[str, str]]) -> Iterator[str]:
    yield f"- {_message(text)}"
    for note in causes:
        if note["match"] in without_labels(text):
            yield f"\n    {note['cause']}\n"


def _message(text: str) -> str:
    """A message as code, in which nothing is taken for Markdown."""
    escaped = "".join(
        character if character.isalnum() or character in " ⟨⟩" else f"&#{ord(character)};"
        for character in text
    )
    return f'<code class="message">{escaped}</code>'


def _subject(file: str) -> str:
    return _SUBJECTS[file.partition("/")[0]]


def _rank(file: str) -> int:
    return list(_SUBJECTS).index(file.partition("/")[0])


def _block(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```"


_PARTS: dict[str, Callable[[], str]] = {
    "command_line": command_line,
    "settings": settings_tables,
    "error_messages": error_messages,
}
