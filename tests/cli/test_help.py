"""Every command has help, whose settings are those of the configurations."""

import pytest

from mhc_lightning.cli.commands import COMMANDS
from mhc_lightning.cli.help import command_help, overall_help
from mhc_lightning.cli.main import main


def test_the_help_lists_commands_experiments_and_choices(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert text.rstrip("\n") == overall_help()
    for name, command in COMMANDS.items():
        assert f"\n  {name:<8}  {command.about}\n" in text
    assert "\n  mhc_quickstart " in text and "strategy=    auto|ddp|fsdp|pipeline|" in text
    assert "\n  optimizer.lr=0.001       peak learning rate\n" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("command", COMMANDS.values(), ids=list(COMMANDS))
def test_a_command_has_help_and_a_function(command, capsys):
    assert main([command.name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.rstrip("\n") == command_help(command)
    assert f"usage: python -m mhc_lightning {command.name} " in text
    assert text.count("\n  python -m mhc_lightning ") == len(command.examples) > 0
    assert ("--json " in text) == command.json or "--json" in "".join(command.examples)
    assert max(map(len, text.splitlines())) <= 100
    assert callable(command.load())


def test_settings_have_their_defaults_and_meanings_from_the_configurations():
    text = command_help(COMMANDS["generate"])
    assert "\n  top_k=null " in text and "draw from the k likeliest tokens; null: from all" in text
    assert "(max_new_tokens is short for generate.max_new_tokens, and so on)" in text
    text = command_help(COMMANDS["fit"])
    assert "\n  checkpoint.keep_last=2 " in text and "newest checkpoints to keep; null: all" in text
    assert "\n  compile=false " in text and "\n  ckpt_path=null " in text


def test_only_some_commands_print_json(capsys):
    assert main(["fit", "--config", "mhc_quickstart", "--json"]) == 2
    assert capsys.readouterr().err == (
        "error: --json belongs to plan, validate, evaluate, inspect, report\n"
    )
