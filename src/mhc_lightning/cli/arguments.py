"""A command line, read: the command, the configuration, options and overrides.

By hand, as argparse has no word for Hydra's marks (`+key`, `~key`) or for values kept literally.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field

from mhc_lightning.cli.commands import COMMANDS, Command
from mhc_lightning.errors import UserError

_FLAGS = {"--print-config": "print_config", "--json": "json", "--help": "help", "-h": "help"}

# Their values are the characters typed, never Hydra's grammar or an interpolation.
LITERAL_KEYS = (
    *("prompt", "input", "output", "output_dir", "ckpt_path", "picture", "times"),
    *("data.path", "data.tokenizer", "data.cache_dir", "prepare.tokenizer"),
    *("prepare.text_template", "evaluate.tasks", "evaluate.include_path"),
)


@dataclass(frozen=True)
class Arguments:
    """A parsed command line.

    Attributes:
        command: The command, or None.
        config: Path or name of the experiment, or None.
        literal: Values of `LITERAL_KEYS`, or of the command's `path_keys`, in the order given (a
            key may come several times).
        overrides: The other overrides, for Hydra.
        paths: The command's `paths`: the folders of `report`, the checkpoint of `inspect`.
        words: The command line itself.
        print_config: True to show the composed configuration and stop.
        json: True to print JSON on standard output.
        help: True if help is asked for.
        version: True if the version is asked for.
    """

    command: Command | None = None
    config: str | None = None
    literal: dict[str, list[str]] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    print_config: bool = False
    json: bool = False
    help: bool = False
    version: bool = False


def parse_arguments(argv: list[str]) -> Arguments:
    """Read a command line (without the program's name).

    Raises:
        UserError: an unknown command or option, or an argument that is not `key=value`.
    """
    words = iter(argv)
    command: Command | None = None
    config: str | None = None
    literal: dict[str, list[str]] = {}
    overrides: list[str] = []
    paths: list[str] = []
    flags = dict.fromkeys(("print_config", "json", "help", "version"), False)
    for word in words:
        name, has_value, value = word.partition("=")
        if word in _FLAGS:
            flags[_FLAGS[word]] = True
        elif word == "--version":
            flags["version"] = True
        elif name == "--config":
            config = value if has_value else next(words, None)
            if not config:
                raise UserError("--config needs the path or the name of an experiment")
        elif word.startswith("-"):
            raise UserError(f"unknown option {name!r}{_nearest(name, ['--config', *_FLAGS])}")
        elif command is None:
            if word not in COMMANDS:
                raise UserError(
                    f"unknown command {word!r}{_nearest(word, COMMANDS)};"
                    f" commands: {', '.join(COMMANDS)}"
                )
            command = COMMANDS[word]
        elif command.paths == "all":
            if has_value and name in command.path_keys:
                literal.setdefault(name, []).append(value)
            else:
                paths.append(word)
        elif command.paths == "first" and not paths:  # whatever the word holds
            paths.append(word)
        elif has_value and _is_literal(key := name.lstrip("+"), command):
            literal.setdefault(key, []).append(value)
        elif has_value or word.startswith("~"):
            overrides.append(word)
        else:
            raise UserError(
                f"unexpected argument {word!r}: overrides are key=value, and a value with spaces"
                ' needs quotes around it, as in prompt="Hello, world"'
            )
    if flags["json"] and not flags["help"] and (command is None or not command.json):
        with_json = ", ".join(each.name for each in COMMANDS.values() if each.json)
        raise UserError(f"--json belongs to {with_json}")
    return Arguments(command, config, literal, overrides, paths, list(argv), **flags)


def _is_literal(key: str, command: Command) -> bool:
    return key in LITERAL_KEYS or f"{command.section}.{key}" in LITERAL_KEYS


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
