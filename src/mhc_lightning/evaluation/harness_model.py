"""The model interface of the harness, for a network: scores and continues texts.

lm_eval's own `HFLM` needs a model of transformers, with its cache and its `generate`.
"""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from mhc_lightning.data.token_streams import TextStream
from mhc_lightning.data.tokenizers import Tokenizer
from mhc_lightning.errors import UserError
from mhc_lightning.evaluation.scoring import score_continuations
from mhc_lightning.generation import Sampling, generate_together
from mhc_lightning.modules import Transformer

_DEFAULT_NEW_TOKENS = 256  # the harness's default, for tasks without a limit


class HarnessModel(TemplateLM):
    """Answers the requests of the harness with a `Transformer` and its tokenizer.

    Texts begin like documents in training: with the tokenizer's own token, if it has one. A text
    without a context follows that, or else an end-of-document token.

    Args:
        model: The network, in evaluation mode, on its device.
        tokenizer: The tokenizer that the network was trained with.
        batch_size: Sequences per forward pass.
        max_length: Largest number of tokens in a sequence.
        seed: Seed of the sampling, for tasks that do not use greedy decoding.

    Attributes:
        shortened: Number of requests whose context lost its beginning because of `max_length`.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        max_length: int,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value < 1:
                raise UserError(f"evaluate.{name} must be at least 1, not {value}")
        self.model = model
        self.text = tokenizer
        self.batch_size = batch_size
        self.max_length = max_length
        self.seed = seed
        self.shortened = 0

    @property
    def eot_token_id(self) -> int:
        """The end-of-document token."""
        return self.text.end_of_document

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context follows."""
        return (self.text.beginning or [self.eot_token_id])[0]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokens of a text, behind what documents begin with, unless `add_special_tokens=False`."""
        before = [] if add_special_tokens is False else self.text.beginning
        return [*before, *(int(token) for token in self.text.encode(string))]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [
            (context or [self.prefix_token_id], continuation)
            for _, context, continuation in requests
        ]
        self.shortened += sum(len(a) + len(b) > self.max_length + 1 for a, b in pairs)
        with tqdm(total=len(pairs), desc="scoring", disable=disable_tqdm) as bar:
            scores = score_continuations(
                self.model,
                pairs,
                batch_size=self.batch_size,
                max_length=self.max_length,
                on_batch=bar.update,
            )
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihoods of whole texts, in nats.

        A text longer than `max_length` is cut into windows. Each token is predicted once, from the
        tokens before it in its window.
        """
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            for window in rolling:
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        for owner, (log_likelihood, _) in zip(owners, scores, strict=True):
            totals[owner] += log_likelihood
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations, each up to a stop text, the end of the document, or the task's limit.

        Prompts of similar length are continued in one batch. The batch does not change the texts.

        Raises:
            UserError: A task needs more new tokens than `max_length` leaves room for.
        """
        continuations = [
            self._prepare(request.args[0], request.args[1], self.seed + number)
            for number, request in enumerate(requests)
        ]
        order = sorted(range(len(continuations)), key=lambda k: -len(continuations[k].prompt))
        with tqdm(total=len(continuations), desc="generating", disable=disable_tqdm) as bar:
            for start in range(0, len(order), self.batch_size):
                batch = [continuations[k] for k in order[start : start + self.batch_size]]
                self._continue(batch)
                bar.update(len(batch))
        return [continuation.text for continuation in continuations]

    def _prepare(self, context: str, settings: dict[str, Any], seed: int) -> "_Continuation":
        options = dict(normalize_gen_kwargs(settings, _DEFAULT_NEW_TOKENS))
        new_tokens = options["max_gen_toks"]
        room = self.max_length - new_tokens
        if room < 1:
            raise UserError(
                f"a task asks for up to {new_tokens} new tokens, and evaluate.max_length is"
                f" {self.max_length}; give evaluate.max_length={2 * new_tokens} or more"
            )
        tokens = self.tok_encode(context) or [self.eot_token_id]
        self.shortened += len(tokens) > room
        sampling = Sampling(
            new_tokens,
            temperature=options.get("temperature", 1.0) if options["do_sample"] else 0.0,
            top_k=options.get("top_k") or None,  # 0 stands for all
            top_p=options.get("top_p"),
            seed=seed,
        )
        stops = [stop for stop in options["until"] if stop]
        return _Continuation(tokens[-room:], sampling, stops, self.text.stream())

    def _continue(self, batch: "list[_Continuation]") -> None:
        sampled = generate_together(
            self.model,
            [continuation.prompt for continuation in batch],
            [continuation.sampling for continuation in batch],
            end_token=self.eot_token_id,
            is_over=lambda k, token: batch[k].is_stopped,
        )
        for k, token in sampled:
            batch[k].push(token)
        for continuation in batch:
            continuation.finish()


class _Continuation:
    """The text sampled after a prompt; it ends before the first of `stops`."""

    def __init__(
        self, prompt: list[int], sampling: Sampling, stops: list[str], stream: TextStream
    ) -> None:
        self.prompt = prompt
        self.sampling = sampling
        self.text = ""
        self._stops = stops
        self._stream = stream

    @property
    def is_stopped(self) -> bool:
        """True if the text contains a stop."""
        return any(stop in self.text for stop in self._stops)

    def push(self, token: int) -> None:
        """Add a sampled token."""
        self.text += self._stream.push(token)

    def finish(self) -> None:
        """Add the text that the decoder holds back, and cut the text at the first stop."""
        self.text += self._stream.flush()
        places = [self.text.find(stop) for stop in self._stops if stop in self.text]
        self.text = self.text[: min(places, default=None)]
