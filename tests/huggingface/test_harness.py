"""lm-evaluation-harness's `HFLM` gives the scores and texts of this package's `HarnessModel`."""

from typing import Any

import pytest
from causal_lms import ENGRAM
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from mhc_lightning.data.tokenizers import ByteTokenizer
from mhc_lightning.evaluation.harness_model import HarnessModel
from mhc_lightning.huggingface.tokenizer_folder import write_tokenizer

PAIRS = [("The gain of a", " layer"), ("", "streams, twice"), ("mö" * 30, " x"), ("a b", " c\n")]
TEXTS = ["Once upon a time there were n streams. " * 3, "x"]


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


@pytest.fixture(params=["mhc", "engram"])
def models(request, build, tmp_path):
    """Theirs and ours, of the same weights."""
    memory = {"memory": ENGRAM} if request.param == "engram" else {}
    model = build(vocab_size=257, **memory)
    model.config.bos_token_id = model.config.eos_token_id = 256
    write_tokenizer(ByteTokenizer(), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    sizes: dict[str, Any] = {"batch_size": 2, "max_length": 48}
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", **sizes)
    return theirs, HarnessModel(model.model, ByteTokenizer(), **sizes)


def test_scores_are_equal(models):
    found, expected = (
        m.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True) for m in models
    )
    for (a, greedy), (b, best) in zip(found, expected, strict=True):
        assert greedy == best and a == pytest.approx(b, rel=1e-5)
    texts = [(text,) for text in TEXTS]
    found, expected = (
        m.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True)
        for m in models
    )
    assert found == pytest.approx(expected, rel=1e-5)


def test_greedy_texts_are_equal(models):
    settings = {"until": ["\n"], "max_gen_toks": 10, "do_sample": False}
    asked = [(context, dict(settings)) for context, _ in PAIRS if context]
    found, expected = (
        m.generate_until(instances("generate_until", asked), disable_tqdm=True) for m in models
    )
    assert found == expected
