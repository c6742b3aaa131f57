"""Pages that list what there is in the code list all of it, and nothing else."""

import re

from documents import DOCS, REPOSITORY

from mhc_lightning.cli.arguments import LITERAL_KEYS
from mhc_lightning.exit_codes import ExitCode


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def test_the_page_of_exit_codes_has_each_of_them():
    listed = [
        int(code) for code in re.findall(r"^\| (\d+) \|", page("reference/exit_codes.md"), re.M)
    ]
    assert [int(code) for code in listed] == list(ExitCode)


def test_the_page_on_configuration_names_each_choice_of_its_groups():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", page("train/configuration.md"), re.M)
    named = {group: set(re.findall(r"`(\w+)`", values)) for group, values in rows}
    choices = {
        folder.name: {file.stem for file in folder.glob("*.yaml")}
        for folder in (REPOSITORY / "configs").iterdir()
        if folder.is_dir()
    }
    for group in ("optimizer", "callbacks", "logger", "strategy", "model"):
        known = named[group] - {"metrics", "csv"} | (named[group] & choices[group])
        assert known == choices[group], group
    assert named["connection"] <= choices["connection"]


def test_the_page_on_configuration_names_each_key_that_is_taken_as_it_is():
    (sentence,) = re.findall(r"These keys are (.*?)\.\n\n", page("train/configuration.md"), re.S)
    assert set(re.findall(r"`([\w.]+)`", sentence)) == set(LITERAL_KEYS)


def test_the_page_on_connections_names_each_of_them():
    table = page("train/connections.md").split("\n| `residual`")[1].split("\n\n")[0]
    named = {"residual", *re.findall(r"`(\w+)`", table)}
    assert named == {file.stem for file in (REPOSITORY / "configs/connection").glob("*.yaml")}


def test_the_page_on_the_command_line_names_each_environment_variable():
    named = set(re.findall(r"^\| `(MHC_\w+)` \|", page("reference/command_line.md"), re.M))
    source = "".join(
        file.read_text(encoding="utf-8") for file in (REPOSITORY / "src").rglob("*.py")
    )
    internal = {"MHC_LIGHTNING_STARTED"}  # from a process to those that it starts
    assert named == set(re.findall(r"MHC_LIGHTNING_[A-Z]+", source)) - internal


def test_the_page_on_many_devices_names_each_schedule():
    from mhc_lightning.planning.stages import SCHEDULES

    text = page("train/many_devices.md")
    assert all(f"`{schedule}`" in text for schedule in SCHEDULES)


def test_the_page_of_tags_has_each_number_that_the_model_logs():
    source = (REPOSITORY / "src/mhc_lightning/language_model.py").read_text(encoding="utf-8")
    logged = set(re.findall(r'self\.log\(\s*"([\w/]+)"', source)) - {"step"}
    text = page("reference/tags.md")
    assert logged and all(f"`{tag}`" in text for tag in logged)


def test_the_page_of_tags_has_each_number_of_a_memory():
    import torch

    from mhc_lightning.callbacks.memory_use import memory_numbers
    from mhc_lightning.callbacks.watching.memory_readings import MemorySight

    rows, number = torch.zeros(3, 1, dtype=torch.int64), torch.ones(())
    sights = [MemorySight(p, number[None], number, rows, rows, (1,)) for p in ("layer_3", "input")]
    section = page("reference/tags.md").split("## Memory")[1].split("\n## ")[0]
    tags = re.findall(r"`(memory/[^`]+)`", section)
    letters = {"<place>": "(layer_3|input)", "<k>": "3", "<m>": "0", "<n>": "1"}
    for letter, values in letters.items():
        tags = [tag.replace(letter, values) for tag in tags]
    logged = [tag for tag in memory_numbers(sights) if "gate/input" not in tag]
    assert all(any(re.fullmatch(tag, name) for name in logged) for tag in tags)
    assert all(any(re.fullmatch(tag, name) for tag in tags) for name in logged)


def test_the_page_of_settings_has_each_key_with_its_meaning():
    import generated_pages

    from mhc_lightning.cli.settings_reference import settings

    assert "<!-- generated: settings -->" in page("reference/settings.md")
    tables = generated_pages.settings_tables()
    rows = re.findall(r"^\| `([\w.]+)` \| (.+) \| `.*` \| (.+) \|$", tables, re.M)
    assert [key for key, _, _ in rows] == [setting.key for setting in settings()]


def test_the_page_on_the_command_line_has_the_help_of_each_command():
    import generated_pages

    from mhc_lightning.cli.commands import COMMANDS

    assert "<!-- generated: command_line -->" in page("reference/command_line.md")
    headings = re.findall(r"^## (\w+)$", generated_pages.command_line(), re.M)
    assert headings == list(COMMANDS)
