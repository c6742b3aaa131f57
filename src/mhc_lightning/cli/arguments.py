"""What was typed: the command, the configuration, options, and overrides."""

import difflib
from dataclasses import dataclass, field

from mhc_lightning.errors import UserError

COMMANDS = (
    *("plan", "fit", "validate", "generate", "prepare", "export", "import", "evaluate"),
    *("inspect", "report", "tune"),
)
_WITH_JSON = ("plan", "validate", "evaluate", "inspect", "report")
# Commands whose arguments are folders, not settings of an experiment: the keys they have beside.
_WITH_PATHS = {"report": ("output", "baseline")}
_FLAGS = {"--print-config": "print_config", "--json": "json", "--help": "help", "-h": "help"}

# Values of these are the characters typed, never Hydra's grammar or an interpolation.
LITERAL_KEYS = frozenset(
    {
        *("prompt", "input", "output", "output_dir", "ckpt_path"),
        *("data.path", "data.tokenizer", "data.cache_dir", "prepare.tokenizer"),
        *("tasks", "include_path", "evaluate.tasks", "evaluate.include_path"),
        *("picture", "times"),
    }
)


@dataclass(frozen=True)
class Arguments:
    """A parsed command line.

    Attributes:
        command: One of `COMMANDS`, or None.
        config: Path or name of the experiment, or None.
        literal: Values of `LITERAL_KEYS`, in the order given (a key may come several times); of a
            command that takes folders, its keys.
        overrides: The other overrides, for Hydra.
        paths: Arguments that are no `key=value`: the folders of `report`, `inspect`'s checkpoint.
        words: The command line itself.
        print_config: Whether to show the composed configuration and stop.
        json: Whether standard output is to be JSON.
        help: Whether help was asked for.
        version: Whether the version was asked for.
    """

    command: str | None = None
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
    command: str | None = None
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
            command = word
        elif command in _WITH_PATHS:
            if has_value and name in _WITH_PATHS[command]:
                literal.setdefault(name, []).append(value)
            else:
                paths.append(word)
        elif command == "inspect" and not paths:  # whatever the word holds
            paths.append(word)
        elif has_value and (key := name.lstrip("+")) in LITERAL_KEYS:
            literal.setdefault(key, []).append(value)
        elif has_value or word.startswith("~"):
            overrides.append(word)
        else:
            raise UserError(
                f"unexpected argument {word!r}: overrides are key=value, and a value with spaces"
                ' needs quotes around it, as in prompt="Hello, world"'
            )
    if flags["json"] and command not in _WITH_JSON and not flags["help"]:
        raise UserError(f"--json belongs to {', '.join(_WITH_JSON)}")
    return Arguments(command, config, literal, overrides, paths, list(argv), **flags)


def _nearest(word: str, known: "list[str] | tuple[str, ...]") -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
