import json
from functools import partial

import pytest
import torch
import yaml

from mhc_lightning.data.tokenizers import ByteTokenizer
from mhc_lightning.modules import ManifoldHyperConnection, Transformer


@pytest.fixture(scope="session")
def network():
    """A small random network over bytes, sure enough of itself for its choices to differ."""
    torch.manual_seed(3)
    model = Transformer(
        connection=partial(ManifoldHyperConnection), vocab_size=257, dim=24, num_layers=2,
        num_heads=2, head_dim=8, rope_dim=4, kv_rank=8, ffn_dim=32, init_std=0.5,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("phi"):
                parameter.normal_()
    return model.eval()


@pytest.fixture(scope="session")
def direct(network):
    """Log-likelihood and greediness of a continuation: one sequence, token by token."""

    @torch.no_grad()
    def score(context, continuation):
        tokens, total, greedy = list(context), 0.0, True
        for token in continuation:
            logits = network(torch.tensor([tokens]))[0, -1].double()
            total += float(logits.log_softmax(-1)[token])
            greedy &= int(logits.argmax()) == token
            tokens.append(token)
        return total, greedy

    return score


@pytest.fixture(scope="session")
def encode():
    return lambda text: [int(token) for token in ByteTokenizer().encode(text)]


QUESTIONS = ["Which stream?", "How many layers, then?", "Why?", "Is it doubly stochastic?", "And?"]


@pytest.fixture(scope="session")
def local_tasks(tmp_path_factory):
    """A folder of tasks of the harness on local data: choosing, continuing, and plain text."""
    folder = tmp_path_factory.mktemp("tasks, = {1}")
    docs = [
        {"question": q, "choices": ["the first", "no", f"{k} of them"], "answer": k % 3,
         "text": f"{q} Nobody knows. " * 3}
        for k, q in enumerate(QUESTIONS)
    ]  # fmt: skip
    files = {}
    for split, part in (("train", docs[:2]), ("test", docs[1:])):
        files[split] = str(folder / f"{split}.jsonl")
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(doc) for doc in part))
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "fewshot_split": "train",
        "fewshot_config": {"sampler": "first_n"},
    }
    asked = {"doc_to_text": "Q: {{question}}\nA:", "num_fewshot": 2}
    tasks = {
        "local_choice": {
            **asked,
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "local_continuation": {
            **asked,
            "output_type": "generate_until",
            "doc_to_target": "{{choices[answer]}}",
            "generation_kwargs": {"until": ["e", "\n"], "max_gen_toks": 12},
            "metric_list": [{"metric": "exact_match"}],
        },
        "local_text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
        },
    }
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **task}))
    return folder, docs[:2], docs[1:]
