"""The harness's requests are answered as a direct computation answers them."""

import pytest
import torch
from lm_eval.api.instance import Instance

from mhc_lightning.data.tokenizers import ByteTokenizer
from mhc_lightning.errors import UserError
from mhc_lightning.evaluation.harness_model import HarnessModel

END = 256


def model_of(network, **changes):
    settings = {"batch_size": 3, "max_length": 64, **changes}
    return HarnessModel(network, ByteTokenizer(), **settings)


def requests(kind, *arguments):
    return [Instance(kind, {}, args, k) for k, args in enumerate(arguments)]


def test_continuations_are_scored_after_their_contexts(network, direct, encode):
    pairs = [("The gain", " is one"), ("", "alone"), ("spaces  ", "kept"), (" ", "x"), ("é", "ü")]
    scores = model_of(network).loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (log_likelihood, greedy) in zip(pairs, scores, strict=True):
        # Bytes make tokens of their own, so where the context ends makes no difference, but for
        # spaces: the harness counts those before the continuation to it.
        stripped = context.rstrip()
        moved = context[len(stripped) :] + continuation
        expected = direct(encode(stripped) or [END], encode(moved))
        assert log_likelihood == pytest.approx(expected[0], rel=1e-4)
        assert greedy is expected[1]


@pytest.mark.parametrize("max_length", [64, 7])
def test_rolling_scores_predict_every_token_once(network, direct, encode, max_length):
    texts = ["A text longer than the window, by far.", "short", ""]
    model = model_of(network, max_length=max_length)
    found = model.loglikelihood_rolling(
        requests("loglikelihood_rolling", *((text,) for text in texts)), disable_tqdm=True
    )
    for text, total in zip(texts, found, strict=True):
        tokens, expected = [END, *encode(text)], 0.0
        first = tokens[: max_length + 1]
        expected += direct(first[:1], first[1:])[0]
        for start in range(max_length + 1, len(tokens), max_length):
            window = tokens[start : start + max_length]
            seen = tokens[start + len(window) - max_length - 1 : start]
            expected += direct(seen, window)[0]
        assert total == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert model.shortened == 0


@torch.no_grad()
def greedy_text(network, tokens, count):
    drawn: list[int] = []
    for _ in range(count):
        token = int(network(torch.tensor([[*tokens, *drawn]]))[0, -1].argmax())
        if token == END:
            break
        drawn.append(token)
    return ByteTokenizer().decode(drawn)


def test_generation_is_greedy_until_a_stop_text(network, encode):
    model = model_of(network)
    prompts = ["Q: Which stream?\nA:", "x", "Sinkhorn and Knopp, "]
    whole = [greedy_text(network, encode(prompt), 12) for prompt in prompts]

    def generate(**settings):
        arguments = [(prompt, {"max_gen_toks": 12, **settings}) for prompt in prompts]
        return model.generate_until(requests("generate_until", *arguments), disable_tqdm=True)

    assert generate(until=[]) == whole
    assert generate(until=["never"], do_sample=False, temperature=0.7) == whole
    stop = whole[0][4:6]
    assert stop
    assert generate(until=[stop, "never"]) == [text.split(stop)[0] for text in whole]
    assert generate(until=stop)[0] == whole[0].split(stop)[0]
    first = generate(until=[], do_sample=True, temperature=2.0)
    assert first == generate(until=[], do_sample=True, temperature=2.0)
    assert first != whole and first[0] != first[1]


def test_generation_sees_the_end_of_a_long_context(network, encode):
    model = model_of(network, max_length=16)
    prompt = "a context longer than fits"
    settings = {"until": [], "max_gen_toks": 6}
    (text,) = model.generate_until(requests("generate_until", (prompt, settings)), True)
    assert text == greedy_text(network, encode(prompt[-10:]), 6)
    assert model.shortened == 1
    with pytest.raises(UserError, match=r"up to 16 new tokens.*evaluate\.max_length=32"):
        request = requests("generate_until", (prompt, {**settings, "max_gen_toks": 16}))
        model.generate_until(request, True)


@pytest.mark.parametrize("name", ["batch_size", "max_length"])
def test_sizes_are_checked(network, name):
    with pytest.raises(UserError, match=rf"evaluate\.{name} must be at least 1, not 0"):
        model_of(network, **{name: 0})
