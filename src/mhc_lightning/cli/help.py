"""The text of `--help`: the table of commands, and settings from the comments in `configs/`."""

import textwrap
from pathlib import Path

import yaml

from mhc_lightning.cli.arguments import LITERAL_KEYS
from mhc_lightning.cli.commands import COMMANDS, Command
from mhc_lightning.cli.config_comments import CommentedKey, commented_keys
from mhc_lightning.cli.experiments import group_choices, shipped_experiments, shipped_folder

_PROGRAM = "python -m mhc_lightning"
_WIDTH = 100
_OFTEN_CHANGED = (
    *("model.dim", "model.num_layers", "model.num_streams", "data.path", "data.batch_size"),
    *("trainer.max_steps", "trainer.devices", "optimizer.lr", "seed", "output_dir"),
)
_OVERALL = """\
Train, watch and use language models with Hyper-Connections and mHC.

usage: {program} COMMAND --config PATH_OR_NAME [key=value ...]
       {program} report RUN [RUN ...]

commands:
{commands}

options:
  --config PATH_OR_NAME   an experiment: a .yaml file, or the name of a shipped one (below)
  --print-config          show every setting and where its value comes from, and stop
  --help, --version       `{program} COMMAND --help` lists a command's settings

Any setting is overridden by key=value, as in trainer.max_steps=200 or connection=hc.
{literal}

choices:
{choices}

settings most often changed:
{settings}

shipped experiments:
{experiments}

example, from text to text:
  {program} prepare  --config mhc_quickstart input=my_texts output=data/mine
  {program} fit      --config mhc_quickstart data.path=data/mine output_dir=runs/mine
  tensorboard --logdir runs/mine
  {program} report   runs/mine
  {program} generate --config mhc_quickstart data.path=data/mine \\
      output_dir=runs/mine ckpt_path=last prompt="Once upon"

exit codes: 0 done; 2 a mistake in what was asked for (the last line of standard error names it);
3 the loss became NaN or infinite; 4 the machine ended the run: a process died, hung, was cut off or
ran out of memory; 130 interrupted; 143 stopped by SIGTERM, after saving; 1 a bug. All processes of
a run end with the same one."""


def overall_help() -> str:
    """Help on the program, with the experiments that are shipped."""
    choices = {
        f"{group}=": "|".join(names)
        for group, names in group_choices([shipped_folder()]).items()
        if group not in ("base", "run", "size") and len(names) > 1
    }
    return _OVERALL.format(
        program=_PROGRAM,
        literal=textwrap.fill(
            "The characters after `=` are taken as they are for prompts and paths"
            f" ({', '.join(LITERAL_KEYS)}); quote them only for your shell.",
            _WIDTH,
        ),
        commands=_table({name: command.about for name, command in COMMANDS.items()}),
        choices=_table(choices),
        settings=_settings(_OFTEN_CHANGED, ""),
        experiments=_table(shipped_experiments()),
    )


def command_help(command: Command) -> str:
    """Help on a command."""
    usage = f"usage: {_PROGRAM} {command.name} {command.usage}"
    parts = [
        textwrap.fill(command.description, _WIDTH),
        textwrap.fill(usage, _WIDTH, subsequent_indent="       ", break_on_hyphens=False),
    ]
    if command.settings:
        listed = _settings(command.settings, command.section)
        parts.append(f"settings, with their defaults:\n{listed}")
    if command.section:
        first = next(k for k in _members(command.section)).key.rpartition(".")[2]
        parts[-1] += f"\n({first} is short for {command.section}.{first}, and so on)"
    for paragraph in command.notes.split("\n\n") if command.notes else ():
        indented = paragraph.startswith(" ")
        parts.append(paragraph if indented else textwrap.fill(paragraph, _WIDTH))
    if command.json:
        parts.append("  --json   print one JSON object and nothing else on standard output")
    examples = [
        textwrap.fill(f"{_PROGRAM} {line}", _WIDTH - 2, initial_indent="  ",
                      subsequent_indent="      ", break_on_hyphens=False).replace("\n", " \\\n")
        for line in command.examples
    ]  # fmt: skip
    parts.append("\n".join([f"example{'s' * (len(examples) > 1)}:", *examples]))
    return "\n\n".join(parts)


def _settings(keys: tuple[str, ...], section: str) -> str:
    """A line per setting, `key=default` and its comment; those of `section` without its name."""
    rows = {}
    for entry in (found for key in keys for found in _members(key)):
        name = entry.key.removeprefix(f"{section}.") if section else entry.key
        rows[f"{name}={_default(entry)}"] = entry.comment
    return _table(rows)


def _members(key: str) -> list[CommentedKey]:
    """A key of the shipped configurations, or those of the section or group of that name."""
    run = commented_keys(shipped_folder() / "run" / "default.yaml")
    found = [entry for entry in run if entry.key == key or entry.key.startswith(f"{key}.")]
    if not found:
        group, _, rest = key.partition(".")
        for file in _default_first(group):
            found = [
                CommentedKey(f"{group}.{entry.key}", entry.value, entry.comment)
                for entry in commented_keys(file)
                if (not rest and not entry.key.startswith("_")) or entry.key == rest
            ]
            if found:
                break
    return [entry for entry in found if not isinstance(entry.value, dict)]


def _default_first(group: str) -> list[Path]:
    """The files of a group, the one that experiments have by default first."""
    base = yaml.safe_load((shipped_folder() / "base" / "experiment.yaml").read_text("utf-8"))
    chosen = {k.strip("/"): v for item in base["defaults"] if isinstance(item, dict)
              for k, v in item.items()}  # fmt: skip
    files = sorted((shipped_folder() / group).glob("*.yaml"))
    return sorted(files, key=lambda file: file.stem != chosen[group])


def _default(entry: CommentedKey) -> str:
    return "null" if entry.value is None else str(entry.value).replace("True", "true").replace(
        "False", "false").replace("'", "")  # fmt: skip


def _table(rows: dict[str, str], most: int = 34) -> str:
    """Two columns, the second wrapped."""
    width = min(most, max(map(len, rows), default=0))
    lines = []
    for left, right in rows.items():
        text = textwrap.wrap(right, _WIDTH - width - 4, break_on_hyphens=False) or [""]
        first = f"  {left:<{width}}  {text[0]}"
        if len(left) > width:  # too long for its column
            first = f"  {left}\n  {'':<{width}}  {text[0]}"
        lines += [first.rstrip(), *(f"  {'':<{width}}  {line}" for line in text[1:])]
    return "\n".join(lines)
