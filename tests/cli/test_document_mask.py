"""`data.document_mask=true` from `fit` to every command that reads its checkpoints."""

import json
import random

import pytest
import torch
import torch.nn.functional as F

from mhc_lightning import TextDataModule
from mhc_lightning.checkpoints.reading import load_checkpoint
from mhc_lightning.cli.tokenizer import check_tokenizer
from mhc_lightning.data import PreparedData, prepare
from mhc_lightning.data.tokenizers import ByteTokenizer
from mhc_lightning.errors import UserError
from mhc_lightning.interchange import load_exported

END = ByteTokenizer.end_of_document
WORDS = (
    "callbacks=minimal", "optimizer.schedule=constant", "trainer.max_steps=4", "memory=engram",
    "memory.rows=300", "memory.num_heads=2", "memory.dim=8", "data.validation_sequences=null",
    "data.document_mask=true",
)  # fmt: skip
LAST = ("output_dir=run", "ckpt_path=last")


@pytest.fixture(scope="module")
def short_documents(tmp_path_factory):
    """A prepared folder in which many documents share a sequence, some of one byte."""
    folder, generator = tmp_path_factory.mktemp("short"), random.Random(3)
    texts = ["".join(generator.choices("abcdefg ", k=generator.choice([1, 4, 30]))) + "."
             for _ in range(160)]  # fmt: skip
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    prepare(folder / "text.jsonl", folder / "tokens", validation_fraction=0.3, num_workers=1,
            progress=False)  # fmt: skip
    return folder / "tokens"


@pytest.fixture(scope="module")
def masked(tmp_path_factory, command_in, short_documents):
    """A run with documents kept apart, and its exported folder; to be read only."""
    command = command_in(tmp_path_factory.mktemp("masked"))
    command.data = short_documents
    assert command.inside("fit", *WORDS, "output_dir=run") == 0
    assert command.inside("export", *WORDS, *LAST, "output=exported") == 0
    return command


def losses_of_pieces_alone(network, data):
    """The losses of all held-out sequences, each cut by hand where a document ends."""
    network.mask_documents(None)
    sequences = data._validation_sequences()
    losses = []
    for row in (sequences[k].tolist() for k in range(len(sequences))):
        pieces: list[list[int]] = [[]]
        for token in row:
            if token >= 0:
                pieces[-1].append(token)
            if token == END:
                pieces.append([])
        for piece in pieces:
            if len(piece) > 1:
                tokens = torch.tensor([piece])
                logits = network(tokens[:, :-1])[0]
                losses += F.cross_entropy(logits, tokens[0, 1:], reduction="none").tolist()
    return torch.tensor(losses, dtype=torch.float64)


def test_validation_is_that_of_each_document_alone(masked, capsys):
    assert masked.inside("validate", *WORDS, *LAST, "--json") == 0
    printed = capsys.readouterr()
    measured = json.loads(printed.out)
    network = load_exported(masked.folder / "exported")
    data = TextDataModule(masked.data, 4, 2, 32, validation_sequences=None)
    with torch.no_grad():
        losses = losses_of_pieces_alone(network, data)
    assert measured["val/tokens"] == len(losses) < sum(data._validation_sequences().num_tokens)
    assert measured["val/loss"] == pytest.approx(float(losses.mean()), rel=1e-6)
    assert "warning" not in printed.err


def test_the_other_setting_is_warned_of_in_validation(masked, capsys):
    assert masked.inside("validate", *WORDS, *LAST, "data.document_mask=false") == 0
    assert "was trained with data.document_mask=true, and this loss" in capsys.readouterr().err


def test_a_run_does_not_go_on_with_the_other_setting(masked, capsys):
    words = (*WORDS, *LAST, "trainer.max_steps=6", "data.document_mask=false")
    assert masked.inside("fit", *words) == 2
    assert "document_mask was True and is False" in capsys.readouterr().err


def test_what_reads_a_checkpoint_keeps_its_documents_apart(masked, capsys):
    network = load_exported(masked.folder / "exported")
    assert network.end_of_document == END
    assert json.loads((masked.folder / "exported/config.json").read_text())["document_mask"] is True
    saved = load_checkpoint((masked.folder / "run/checkpoints/last").resolve(), trusted=True)
    network.mask_documents(None)
    check_tokenizer(ByteTokenizer(), saved, "last", network)
    assert network.end_of_document == END
    drawn = []
    for form in (LAST, ("ckpt_path=exported",)):
        capsys.readouterr()
        assert masked.inside("generate", *WORDS, *form, "prompt=abc", "max_new_tokens=9") == 0
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1] != ""


def test_n_grams_that_look_across_documents_are_refused_before_anything_is_written(masked, capsys):
    words = (*WORDS, "memory.documents=false", "output_dir=refused")
    assert masked.inside("fit", *words) == 2
    assert "error: data.document_mask=true keeps documents apart" in capsys.readouterr().err
    assert not (masked.folder / "refused/config.yaml").exists()


def test_tokens_without_an_end_of_documents_are_refused(short_documents, monkeypatch):
    data = TextDataModule(short_documents, 4, 2, 32, document_mask=True)
    assert data.document_boundary == END
    monkeypatch.setattr(ByteTokenizer, "end_of_document", None)
    with pytest.raises(UserError, match="needs a token that ends documents, and the tokens of"):
        data.setup("fit")
    unmasked = TextDataModule(short_documents, 4, 2, 32)
    unmasked.setup("fit")
    assert unmasked.document_boundary is None


def test_a_fit_on_conversations_validates_their_answers(command, capsys):
    pairs = [{"prompt": f"{n} and {n} are ", "completion": f"{2 * n}."} for n in range(90)]
    file = command.folder / "chats.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    command.data = command.folder / "chats"
    held_out = ("validation_fraction=0.3", "num_workers=1", "conversations=true")
    assert command.inside("prepare", "input=chats.jsonl", "output=chats", *held_out) == 0
    words = ("callbacks=minimal", "data.document_mask=true", "data.validation_sequences=null")
    assert command.inside("fit", *words, "output_dir=run") == 0
    assert command.metrics()[6]["train/loss"]
    capsys.readouterr()
    assert command.inside("validate", *words, *LAST, "--json") == 0
    measured = json.loads(capsys.readouterr().out)
    completions = {pair["prompt"] + pair["completion"]: pair["completion"] for pair in pairs}
    texts = [text.decode() for text in PreparedData(command.data).documents("validation")]
    assert measured["val/tokens"] == sum(len(completions[text]) + 1 for text in texts) > 20
    assert "val/bits_per_byte" not in measured
