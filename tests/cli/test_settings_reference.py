"""The reference of settings has every key of every group, with a type and a meaning."""

import yaml

from mhc_lightning.cli.config_comments import commented_keys, file_comment
from mhc_lightning.cli.experiments import group_choices, shipped_folder
from mhc_lightning.cli.settings_reference import GROUPS, settings


def leaves(node, prefix):
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_every_key_of_every_group_has_a_type_and_a_meaning():
    found = settings()
    assert all(setting.type and setting.default for setting in found)
    assert [s for s in found if not s.meaning] == []
    for group in GROUPS:
        for file in (shipped_folder() / group).glob("*.yaml"):
            content = yaml.safe_load(file.read_text())
            content.pop("defaults", None)
            keys = {s.key for s in found if s.file == f"{group}/{file.name}"}
            wanted = set(leaves(content, "" if group == "run" else f"{group}."))
            assert keys == {key for key in wanted if not key.endswith("_partial_")}, file
    others = set(group_choices([shipped_folder()])) - {"base", "size"}
    assert others == set(GROUPS)


def test_types_come_from_signatures_and_meanings_from_comments_and_docstrings():
    by_key = {(s.file, s.key): s for s in settings()}
    decay = by_key["run/default.yaml", "prepare.validation_fraction"]
    assert (decay.type, decay.default) == ("a number", "0.01")
    assert decay.meaning == "share of the documents held out for validation"
    assert by_key["data/text.yaml", "data.micro_batch_size"].type == "a whole number or null"
    schedule = by_key["optimizer/adamw.yaml", "optimizer.schedule"]
    assert schedule.type == "one of step, cosine, constant"
    assert by_key["model/moe_tiny.yaml", "model.num_layers"].meaning.startswith("blocks, of two")
    target = by_key["callbacks/default.yaml", "callbacks.dashboard._target_"]
    assert target.type == "class" and target.default.endswith(".StabilityDashboard")
    assert target.meaning


def test_comments_are_read_from_beside_a_key_or_from_above_it(tmp_path):
    file = tmp_path / "some.yaml"
    file.write_text(
        "# @package _global_\n# About the file,\n# in two lines.\nfirst: 1\n"
        "# Above\n# it.\nsecond: '#5'  # beside\n# A section.\nthird:\n  inner: [a, b]   # a list\n"
        "  quiet: {x: 1}\n"
    )
    assert file_comment(file) == "About the file, in two lines."
    assert [(k.key, k.value, k.comment) for k in commented_keys(file)] == [
        ("first", 1, ""),
        ("second", "#5", "beside"),
        ("third", {"inner": ["a", "b"], "quiet": {"x": 1}}, "A section."),
        ("third.inner", ["a", "b"], "a list"),
        ("third.quiet", {"x": 1}, ""),
    ]
