"""Tasks of lm-evaluation-harness on local data: choosing, continuing, and plain text."""

import json
from pathlib import Path
from typing import Any

import yaml

QUESTIONS = ["Which stream?", "How many layers, then?", "Why?", "Is it doubly stochastic?", "And?"]


def write_local_tasks(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Write ``local_choice``, ``local_continuation`` and ``local_text``.

    Args:
        folder: Where to; it has to exist.

    Returns:
        The documents that examples are taken from, and those that are asked.
    """
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
    tasks: dict[str, dict[str, Any]] = {
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
    return docs[:2], docs[1:]
