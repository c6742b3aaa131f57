"""Conversations: only answers are predicted, from the record to the loss."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import tiny_transformer

from mhc_lightning import LanguageModel, TextDataModule
from mhc_lightning.data import PreparedData, prepare
from mhc_lightning.data.context_tokens import stored_ids
from mhc_lightning.data.conversation_tokenizer import ConversationTokenizer
from mhc_lightning.data.conversations import conversation_of, to_bytes
from mhc_lightning.data.prepared_record import PreparedRecord
from mhc_lightning.data.tokenizers import JsonTokenizer
from mhc_lightning.errors import UserError
from mhc_lightning.language_model import inputs_and_targets
from mhc_lightning.optimizers import AdamWRecipe

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [
    {"role": "user", "content": "Which? <|im_end|>"},  # text that spells a token of the template
    {"role": "assistant", "content": "This."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Gänzlich."},
]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bytes, and the tokens of a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tokenizer")
    special = [END, START, STOP]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def encoded(folder: Path, record: dict[str, Any]) -> tuple[list[int], list[int]]:
    """All ids, and those that are predicted, of a record."""
    tokens = ConversationTokenizer(JsonTokenizer(folder)).encode(to_bytes(conversation_of(record)))
    assert tokens.dtype == np.uint32
    ids = stored_ids(tokens)
    return ids.tolist(), ids[ids == tokens].tolist()


def text_of(folder: Path, ids: list[int]) -> str:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def test_answers_are_what_the_template_writes_behind_its_beginning(tokenizer_folder: Path) -> None:
    """The messages are those of transformers; the last question has no answer to learn from."""
    rest = {"role": "user", "content": "And then?"}
    ids, answers = encoded(tokenizer_folder, {"messages": [*CHAT, rest]})
    written = "".join(f"{START}{m['role']}\n{m['content']}{STOP}\n" for m in CHAT)
    assert text_of(tokenizer_folder, ids) == written
    assert text_of(tokenizer_folder, answers) == f"This.{STOP}\nGänzlich.{STOP}\n"
    assert ids.count(2) == 4  # the spelt one is text


def test_a_completion_is_predicted_and_no_message_of_its_prompt(tokenizer_folder: Path) -> None:
    record: dict[str, Any] = {"prompt": CHAT[:3], "completion": CHAT[3:]}
    ids, answers = encoded(tokenizer_folder, record)
    assert ids == encoded(tokenizer_folder, {"messages": CHAT})[0]
    assert text_of(tokenizer_folder, answers) == f"Gänzlich.{STOP}\n"
    plain = encoded(tokenizer_folder, {"prompt": f"1 + 1 = {END}", "completion": "2"})
    assert [text_of(tokenizer_folder, part) for part in plain] == [f"1 + 1 = {END}2", "2"]
    assert 0 not in plain[0]


PAIRS = [{"prompt": f"{n} + {n} = ", "completion": str(2 * n)} for n in range(60)]


def write(folder: Path, records: list[dict[str, Any]]) -> Path:
    file = folder / "conversations.jsonl"
    file.write_text("\ufeff" + "".join(json.dumps(record) + "\n\n" for record in records))
    return file


def prepared(folder: Path, **settings: Any) -> Path:
    """A prepared folder of pairs, in bytes."""
    options = {"conversations": True, "validation_fraction": 0.3, "num_workers": 1, **settings}
    prepare(write(folder, PAIRS), folder / "out", progress=False, **options)
    return folder / "out"


def test_a_prepared_folder_gives_batches_in_which_answers_alone_are_targets(tmp_path: Path) -> None:
    path = prepared(tmp_path)
    data = PreparedData(path)
    texts = [text.decode() for split in ("train", "validation") for text in data.documents(split)]
    assert sorted(texts) == sorted(pair["prompt"] + pair["completion"] for pair in PAIRS)
    assert data.record.targets == "answers" and np.isnan(data.bytes_per_token())
    module = TextDataModule(path, 4, 2, 400, validation_sequences=None)
    batch = module._validation_sequences()[0][None]  # all that is held out, and padding
    assert batch.dtype == torch.int64 and batch.shape == (1, 401)
    inputs, targets = inputs_and_targets(batch)
    completion = {pair["prompt"] + pair["completion"]: pair["completion"] for pair in PAIRS}
    held_out = [text.decode() for text in data.documents("validation")]
    answers = [token for text in held_out for token in (*completion[text].encode(), 256)]
    assert targets[targets >= 0].tolist() == answers
    whole = [token for text in held_out for token in (*text.encode(), 256)]
    assert inputs[0, : len(whole) - 1].tolist() == whole[:-1]
    assert len(answers) < len(whole) / 3


@pytest.mark.parametrize("document_mask", [False, True])
def test_the_loss_is_the_mean_over_answers(tmp_path: Path, document_mask: bool) -> None:
    """Against one forward pass for each position that has an answer's token behind it."""
    module = TextDataModule(prepared(tmp_path), 4, 2, 24, document_mask=document_mask)
    batch = module.training_sequences.__getitems__([0, 1, 2])
    model = LanguageModel(tiny_transformer(vocab_size=257).double(), AdamWRecipe(lr=1.0))
    model.model.mask_documents(module.document_boundary)
    reference = tiny_transformer(vocab_size=257).double()
    row = torch.where(batch < 0, -101 - batch, batch)
    losses = []
    with torch.no_grad():
        for tokens, marked in zip(row, batch, strict=True):
            for at in (marked[1:] >= 0).nonzero().flatten().tolist():
                start = 0
                if document_mask:
                    ends = (tokens[: at + 1] == 256).nonzero().flatten().tolist()
                    start = ends[-1] + 1 if ends else 0
                if start > at:
                    continue  # the first token of a document
                logits = reference(tokens[None, start : at + 1])
                losses.append(F.cross_entropy(logits[0, -1], tokens[at + 1]))
        loss = model.model.loss(*model._inputs_and_targets(batch))
    assert len(losses) > 5
    assert float(loss) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-10)


def test_a_batch_without_any_answer_changes_nothing() -> None:
    model = tiny_transformer()
    loss = model.loss(*inputs_and_targets(-101 - torch.randint(40, (2, 9))))
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_records_say_what_is_predicted(tmp_path: Path) -> None:
    path = prepared(tmp_path) / "prepared.json"
    text = path.read_text()
    record = PreparedRecord.from_json(text)
    assert json.loads(text)["format"] == 2 and record.to_json() == text
    for change in ({"format": 1}, {"targets": "all"}):
        with pytest.raises(ValueError, match="its targets are not those of its format"):
            PreparedRecord.from_json(json.dumps({**json.loads(text), **change}))
    prepare(write(tmp_path, [{"text": "a"} for _ in PAIRS]), tmp_path / "plain", progress=False,
            validation_fraction=0)  # fmt: skip
    plain = json.loads((tmp_path / "plain/prepared.json").read_text())
    assert plain["format"] == 1 and "targets" not in plain


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ([1], "is list, not an object with fields"),
        ({"text": "a"}, "has neither the field 'messages' nor the fields 'prompt' and"),
        ({"prompt": "a", "completion": ""}, "has an empty completion"),
        ({"prompt": CHAT, "completion": "a"}, "'completion' that is str, not a list of messages"),
        ({"messages": [{"role": "user"}]}, r"a message \(1 of 'messages'\) without the texts"),
        ({"messages": CHAT[:1]}, "no message of the role 'assistant'"),
    ],
)
def test_what_is_no_conversation_is_refused_by_its_line_or_left_out(
    tmp_path: Path, record: object, fault: str
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(PAIRS[0]) + "\n" + json.dumps(record) + "\n")
    settings: dict[str, Any] = {"conversations": True, "num_workers": 1, "progress": False}
    with pytest.raises(UserError, match=rf"line 2 of \S+a\.jsonl .*{fault}"):
        prepare(file, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    summary = prepare(
        file, tmp_path / "out", on_bad_record="skip", validation_fraction=0, **settings
    )
    assert summary.total.documents == 1 and summary.record.skipped.bad_records == 1


def test_conversations_are_read_from_all_formats_of_records(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    import pyarrow
    import pyarrow.parquet

    records: list[dict[str, Any]] = [{"id": k, "messages": CHAT} for k in range(5)]
    write(tmp_path, records)
    (tmp_path / "array.json").write_text(json.dumps(records))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    seen = []
    for name in ("conversations.jsonl", "array.json", "a.parquet"):
        out = tmp_path / f"{name}.out"
        prepare(tmp_path / name, out, tokenizer=tokenizer_folder, conversations=True,
                num_workers=1, progress=False, validation_fraction=0)  # fmt: skip
        data = PreparedData(out)
        seen.append([data.tokens(chunk).tolist() for chunk in data.chunks("train")])
        assert data.record.counts["train"].documents == 5
    assert seen[0] == seen[1] == seen[2]


def test_other_input_is_refused(tmp_path: Path) -> None:
    import zipfile

    def refused(message: str, name: str, **settings: Any) -> None:
        with pytest.raises(UserError, match=message):
            prepare(tmp_path / name, tmp_path / "out", conversations=True, num_workers=1,
                    progress=False, **settings)  # fmt: skip

    (tmp_path / "a.txt").write_text("text")
    refused(r"are records, as of JSON Lines, and \S+a\.txt is plain text", "a.txt")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("b.txt", "text")
    refused("and an archive also holds texts", "a.zip")
    write(tmp_path, PAIRS)
    refused("text_template=… makes texts", "conversations.jsonl", text_template="{a}")


def test_tokenizers_without_a_fitting_template_are_refused(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    import shutil

    def refused(message: str, tokenizer: str | Path, **settings: Any) -> None:
        with pytest.raises(UserError, match=message):
            prepare(write(tmp_path, [{"messages": CHAT}]), tmp_path / "out", tokenizer=tokenizer,
                    conversations=True, num_workers=1, progress=False, validation_fraction=0,
                    **settings)  # fmt: skip

    refused("^messages need a tokenizer with a chat template, and bytes have none", "bytes")
    refused("writes the token that ends documents", tokenizer_folder, end_of_document=STOP)
    other = tmp_path / "other"
    shutil.copytree(tokenizer_folder, other)
    template = other / "chat_template.jinja"
    template.write_text(TEMPLATE + "{{ messages | length }}")
    refused("writes what precedes an answer differently", other)
    template.write_text("{{ raise_exception('no\\nsuch roles') }}")
    refused(r"does not take the messages of 'Which.*no such roles", other)
    template.unlink()
    refused(r"^\S+ has no chat template for messages", other)
    (other / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"} more')
    refused("mend its tokenizer_config.json", other, end_of_document=END)


def test_another_template_is_another_output(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    shutil.copytree(tokenizer_folder, tmp_path / "own")

    def prepared() -> bool:
        summary = prepare(
            tmp_path / "chats.jsonl", tmp_path / "out", tokenizer=tmp_path / "own",
            conversations=True, validation_fraction=0, num_workers=1, progress=False,
        )  # fmt: skip
        return summary.reused

    assert [prepared(), prepared()] == [False, True]
    (tmp_path / "own/chat_template.jinja").write_text(TEMPLATE.replace("assistant\n", "bot\n"))
    with pytest.raises(UserError, match="holds other input or settings"):
        prepared()
