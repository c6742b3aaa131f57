"""Tokens of conversations by a tokenizer's own chat template, with those that are not predicted.

Templates are rendered by transformers (extra `huggingface`), in its sandbox. Text of a message that
spells a control token stays text.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from mhc_lightning.data.context_tokens import STORED_DTYPE, stored, stored_ids
from mhc_lightning.data.conversations import Conversation, answers_in, from_bytes
from mhc_lightning.data.token_streams import TextStream
from mhc_lightning.data.tokenizer_files import companions_of
from mhc_lightning.data.tokenizers import JsonTokenizer, Tokenizer
from mhc_lightning.errors import UserError
from mhc_lightning.files.checksums import file_xxh3

_SHOWN = 60  # characters of a conversation in an error message


class ConversationTokenizer(Tokenizer):
    """A tokenizer of conversations, as `conversations.to_bytes` gives them, by another of texts.

    Tokens are uint32, as `context_tokens` stores them. Those of answers are predicted, and the end
    of document, which follows the last answer. A prompt and a completion that are texts are encoded
    by themselves, without a template; the template writes what messages begin with.

    Args:
        texts: The tokenizer of texts.
    """

    def __init__(self, texts: Tokenizer) -> None:
        self.texts = texts
        self.name, self.vocab_size = texts.name, texts.vocab_size
        self.end_of_document = texts.end_of_document
        self.fingerprint, self.unknown = texts.fingerprint, texts.unknown

    def __reduce__(self) -> tuple[Any, ...]:
        return ConversationTokenizer, (self.texts,)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the stored tokens."""
        return STORED_DTYPE

    def encode(self, text: bytes | str) -> np.ndarray:
        """Tokens of a conversation.

        Raises:
            UserError: The tokenizer has no chat template, the template does not suit the
                conversation, or it writes the token that ends documents.
        """
        try:
            conversation = from_bytes(text.encode() if isinstance(text, str) else text)
        except (ValueError, TypeError) as error:
            raise UserError(
                "conversations are records, as of JSON Lines, and an archive also holds texts;"
                " leave them out with exclude=…"
            ) from error
        pieces = [stored(ids, answer) for ids, answer in self._pieces(conversation)]
        tokens = np.concatenate(pieces)
        if (stored_ids(tokens) == self.end_of_document).any():
            raise UserError(
                f"the chat template of {self.name} itself writes the token that ends documents;"
                " name another of its tokens with end_of_document=…, such as '<|endoftext|>'"
            )
        return tokens

    def encode_documents(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """See `encode`."""
        return [self.encode(document) for document in documents]

    def template_checksums(self) -> dict[str, str]:
        """Checksums of the files that say how messages are written, by their names."""
        if not isinstance(self.texts, JsonTokenizer):
            return {}
        return {file.name: file_xxh3(file) for file in companions_of(self.texts.path)}

    def _pieces(self, conversation: Conversation) -> Iterator[tuple[np.ndarray, bool]]:
        """Tokens in turn, and whether they are predicted."""
        prompt, completion = conversation
        if isinstance(prompt, str) or isinstance(completion, str):
            yield np.array(self.texts.beginning, np.int64), False
            yield self.texts.encode(str(prompt)), False
            yield self.texts.encode(str(completion)), True
            return
        messages, done = [*prompt, *completion], np.zeros(0, np.int64)
        for number in answers_in(messages, len(prompt)):
            before = self._render(messages[:number], asks=True)
            after = self._render(messages[: number + 1], asks=False)
            if not (_begins(before, done) and _begins(after, before)):
                raise UserError(
                    f"the chat template of {self.name} writes what precedes an answer differently"
                    f" with the answer behind it, so that its tokens cannot be told apart, in"
                    f" {str(messages[0]['content'])[:_SHOWN]!r}…; use another template"
                )
            yield before[len(done) :], False
            yield after[len(before) :], True
            done = after

    def _render(self, messages: list[dict[str, Any]], asks: bool) -> np.ndarray:
        """Ids of messages; with `asks`, and of what begins an answer."""
        chat = self._chat
        try:
            ids = chat.apply_chat_template(
                messages,
                add_generation_prompt=asks,
                sanitize_control_tokens=True,
                return_dict=False,
            )
        except Exception as error:  # a template raises what it likes
            shown = str(messages[0]["content"])[:_SHOWN] if messages else "an answer without any"
            raise UserError(
                f"the chat template of {self.name} does not take the messages of {shown!r}…:"
                f" {' '.join(str(error).split())}; fix or remove them"
            ) from error
        return np.array(ids, dtype=np.int64)

    @cached_property
    def _chat(self) -> Any:
        """The tokenizer with its chat template, as transformers reads it."""
        try:
            from transformers import PreTrainedTokenizerFast
        except ImportError as error:
            raise UserError(
                "chat templates are rendered by transformers, which is not installed: pip install"
                ' "mhc-lightning[huggingface]"'
            ) from error
        if not isinstance(self.texts, JsonTokenizer):
            raise UserError(
                "messages need a tokenizer with a chat template, and bytes have none; name its"
                " folder with tokenizer=…"
            )
        folder = self.texts.path.parent
        try:
            chat = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # of any file beside the tokenizer's
            raise UserError(
                f"transformers cannot read the tokenizer in {folder}"
                f" ({' '.join(str(error).split())}); mend its tokenizer_config.json"
            ) from error
        if chat.chat_template is None:
            raise UserError(
                f"{folder} has no chat template for messages (chat_template.jinja, or chat_template"
                " in tokenizer_config.json); put the model's own there"
            )
        return chat

    # What follows is of texts.

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """See `Tokenizer`."""
        return self.texts.decode_bytes(ids)

    def stream(self, after: Iterable[int] = ()) -> TextStream:
        """See `Tokenizer`."""
        return self.texts.stream(after)

    def vocabulary(self) -> Iterator[tuple[str, str]]:
        """See `Tokenizer`."""
        return self.texts.vocabulary()

    def record(self) -> dict[str, Any]:
        """See `Tokenizer`."""
        return self.texts.record()


def _begins(tokens: np.ndarray, beginning: np.ndarray) -> bool:
    return np.array_equal(tokens[: len(beginning)], beginning)
