"""Records of conversations: messages, or a prompt and its completion, with what is to be learnt.

`{"messages": [{"role": …, "content": …}, …]}` is learnt in its assistant's messages,
`{"prompt": …, "completion": …}` in the completion, both texts or both lists of messages. These are
the records that TRL's trainers take.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from mhc_lightning.data.record_text import BadRecord, field_names

FIELDS = ("messages", "prompt", "completion")
_ANSWERS = "assistant"


class Conversation(NamedTuple):
    """What is to be read, and what of it is to be predicted.

    Attributes:
        prompt: A text, or messages that are all read.
        completion: A text to predict, or messages of which the assistant's are predicted.
    """

    prompt: str | list[dict[str, Any]]
    completion: str | list[dict[str, Any]]


def conversation_of(record: object) -> Conversation:
    """The conversation of a record; what follows its last answer is left out.

    Raises:
        BadRecord: The record is none, or has no answer to learn from.
    """
    if not isinstance(record, Mapping):
        raise BadRecord(f"is {type(record).__name__}, not an object with fields")
    if record.get("messages") is not None:
        return Conversation([], _until_last_answer(_messages(record, "messages")))
    if record.get("prompt") is None or record.get("completion") is None:
        raise BadRecord(
            "has neither the field 'messages' nor the fields 'prompt' and 'completion' but"
            f" {field_names(record)}"
        )
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise BadRecord("has an empty completion, and nothing to learn from")
        return Conversation(prompt, completion)
    prompt, completion = _messages(record, "prompt"), _messages(record, "completion")
    return Conversation(prompt, _until_last_answer(completion))


def to_bytes(conversation: Conversation) -> bytes:
    """A conversation as a line of JSON, to be read by `from_bytes`."""
    return json.dumps(conversation, ensure_ascii=False).encode("utf-8", "surrogatepass")


def from_bytes(data: bytes) -> Conversation:
    """What `to_bytes` was given."""
    return Conversation(*json.loads(data.decode("utf-8", "surrogatepass")))


def answers_in(messages: list[dict[str, Any]], start: int) -> list[int]:
    """The numbers of an assistant's messages from `start` on."""
    return [k for k, m in enumerate(messages) if k >= start and m["role"] == _ANSWERS]


def _messages(record: Mapping[str, Any], field: str) -> list[dict[str, Any]]:
    messages = record[field]
    if not isinstance(messages, list | tuple):
        raise BadRecord(
            f"has a field {field!r} that is {type(messages).__name__}, not a list of messages"
        )
    for number, message in enumerate(messages, start=1):
        whole = isinstance(message, Mapping) and isinstance(message.get("role"), str)
        if not whole or not isinstance(message.get("content"), str):
            raise BadRecord(
                f"has a message ({number} of {field!r}) without the texts 'role' and 'content'"
            )
    return [dict(message) for message in messages]


def _until_last_answer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    answers = answers_in(messages, 0)
    if not answers:
        raise BadRecord(f"has no message of the role {_ANSWERS!r} to learn from")
    return messages[: answers[-1] + 1]
