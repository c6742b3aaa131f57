"""Every error that the package can raise for a user is on the page of troubleshooting."""

import generated_pages
import pytest
import yaml
from documents import DOCS
from messages import Message, messages, without_labels


@pytest.fixture(scope="module")
def found() -> list[Message]:
    return messages()


@pytest.fixture(scope="module")
def notes() -> dict:
    return yaml.safe_load(generated_pages.NOTES.read_text(encoding="utf-8"))


def test_messages_are_read_from_the_source(found):
    texts = {(message.file, message.text) for message in found}
    assert (
        "cli/prepare.py",
        "prepare needs output=FOLDER, as data.path is a mixture of several",
    ) in texts
    assert any("⟨folder⟩ already holds a run" in text for _, text in texts)
    assert len(found) > 250
    assert {"UserError", "RunFaultError", "NonFiniteLossError"} <= {m.error for m in found}


def test_no_place_that_raises_one_is_missed(found, repository):
    """Counted another way: by the names in the source, not by its syntax tree."""
    for file in sorted({message.file for message in found}):
        source = (repository / "src/mhc_lightning" / file).read_text(encoding="utf-8")
        called = source.count("raise UserError(")
        assert called <= sum(message.file == file for message in found), file
    raising = [
        path.relative_to(repository / "src/mhc_lightning").as_posix()
        for path in (repository / "src/mhc_lightning").rglob("*.py")
        if "raise UserError(" in path.read_text(encoding="utf-8")
    ]
    assert set(raising) <= {message.file for message in found}


def test_a_message_without_words_of_its_own_is_written_by_hand(found, notes):
    bare = {message.file for message in found if not message.is_readable}
    assert bare == set(notes["elsewhere"])


def test_each_note_is_on_a_message_that_there_is(found, notes):
    for note in notes["causes"]:
        assert any(note["match"] in without_labels(message.text) for message in found), note[
            "match"
        ]


def test_each_message_is_on_the_page(found):
    assert "<!-- generated: error_messages -->" in (DOCS / "troubleshooting.md").read_text()
    page = generated_pages.error_messages()
    for message in found:
        if message.is_readable:
            assert generated_pages._message(message.text) in page, message
