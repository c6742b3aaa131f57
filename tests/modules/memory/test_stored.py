"""What saved weights say of their memory: every difference is named as a setting."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from networks import MEMORIES, tiny_transformer

from mhc_lightning.errors import UserError
from mhc_lightning.modules import Engram, Memory, OverEncoding
from mhc_lightning.modules.memory.stored import check_memory, memory_differences

CLASSES = np.arange(40) // 2  # two tokens of each class
END = 39


def network(memory: Any, bound: bool = True, classes: np.ndarray = CLASSES, end: int = END) -> Any:
    model = tiny_transformer(memory=memory)
    if bound:
        model.memory.bind(classes, end)
    return model


engram = partial(Engram, rows=31, num_heads=2, dim=8)
over_encoding = partial(OverEncoding, rows=57, num_heads=2, dim=8)

CHANGES: dict[str, tuple[Any, Any, str]] = {
    "with and without": (engram, Memory, "memory=engram (not none)"),
    "without and with": (Memory, over_encoding, "memory=none (not over_encoding)"),
    "another kind": (engram, over_encoding, "memory=engram (not over_encoding)"),
    "blocks": (
        partial(engram, layers=[1]), partial(engram, layers=[0, 1]),
        "memory.layers=[1] (not [0, 1])",
    ),
    "orders": (
        engram, partial(engram, orders=[2, 3, 4], rows=31), "memory.orders=[2, 3] (not [2, 3, 4])",
    ),
    "orders of equal sizes": (
        engram, partial(engram, orders=[3], num_heads=4, dim=16),
        "memory.orders=[2, 3] (not [3]), memory.num_heads=2 (not 4), memory.dim=8 (not 16)",
    ),
    "heads": (engram, partial(engram, num_heads=4), "memory.num_heads=2 (not 4)"),
    "rows": (engram, partial(engram, rows=37), "memory.rows=[31, 41] (not [37, 43])"),
    "rows of over-encoding": (
        over_encoding, partial(over_encoding, rows=61), "memory.rows=57 (not 61)",
    ),
    "width": (engram, partial(engram, dim=12), "memory.dim=8 (not 12)"),
    "convolution": (engram, partial(engram, conv=False), "memory.conv=True (not False)"),
    "taps": (engram, partial(engram, conv_kernel=3), "memory.conv_kernel=4 (not 3)"),
    "biases": (engram, partial(engram, bias=True), "memory.bias=False (not True)"),
    "seed": (engram, partial(engram, seed=1), "of memory.seed=1)"),
    "scale of the word": (
        over_encoding, partial(over_encoding, word_scale="mean"),
        "memory.word_scale=full (not mean)",
    ),
    "compression": (
        engram, partial(engram, compress=False), "memory.compress=True (not False)",
    ),
    "documents": (engram, partial(engram, documents=False), "memory.documents=True (not False)"),
    "pad token": (
        engram, partial(engram, pad_token=4),
        "memory.pad_token, a token of class 19 (not 2)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_each_difference_is_named(case: str) -> None:
    saved, now, expected = CHANGES[case]
    weights = network(saved).state_dict()
    model = network(now)
    found = memory_differences(model.memory, weights)
    assert expected in ", ".join(found)
    with pytest.raises(UserError, match=r"the memory of the file is not that of the model: memory"):
        check_memory(model.memory, weights, "the file")
    with torch.device("meta"):
        later = network(now)
    assert memory_differences(later.memory, weights) == found, "on meta, too"


@pytest.mark.parametrize("name", MEMORIES)
def test_the_same_memory_is_taken_bound_or_not(name: str) -> None:
    saved = network(MEMORIES[name])
    for bound in (True, False):
        model = network(MEMORIES[name], bound)
        assert memory_differences(model.memory, saved.state_dict()) == []
        model.load_state_dict(saved.state_dict())
        assert model.memory.is_bound
        model.memory.bind(CLASSES, END)
        with pytest.raises(UserError, match="another tokenizer"):
            model.memory.bind(np.arange(40) // 4, 0)


def test_another_tokenizer_is_told_from_other_settings() -> None:
    weights = network(engram).state_dict()
    other = CLASSES.copy()
    other[[3, 8]] = [7, 2]
    (found,) = memory_differences(network(engram, classes=other).memory, weights)
    assert found == "another tokenizer, with 2 of 40 tokens of another class"
    (found,) = memory_differences(network(engram, end=5).memory, weights)
    assert found == "another tokenizer, whose documents end with token 39 (not 5)"


@pytest.mark.parametrize("compress", [True, False])
def test_what_was_trained_without_a_tokenizer_takes_none_later(compress: bool) -> None:
    memory = partial(engram, compress=compress, documents=compress)
    alone = network(memory, bound=False)
    alone.memory.bind_alone()
    model = network(memory, bound=False)
    model.load_state_dict(alone.state_dict())
    model.memory.bind_alone()
    with pytest.raises(UserError, match="another tokenizer"):
        model.memory.bind(CLASSES, END)
    found = memory_differences(network(memory).memory, alone.state_dict())
    if compress:
        assert found == [
            "memory.compress=False (not True)", "memory.documents=False (not True)"
        ]  # fmt: skip
    else:
        assert found == ["memory.pad_token, a token of class 0 (not 39)"]


def test_tokens_that_no_tokenizer_gives_do_not_count_as_compressed() -> None:
    memory = partial(engram, compress=False)
    weights = network(memory, classes=CLASSES[:30], end=29).state_dict()
    (found,) = memory_differences(network(engram, classes=CLASSES[:30], end=29).memory, weights)
    assert found == "memory.compress=False (not True)"


def test_load_state_dict_refuses_what_its_tensors_do_not_show() -> None:
    weights = network(engram).state_dict()
    model = network(partial(engram, orders=[3], num_heads=4, dim=16), bound=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert [t.shape for t in before.values()] == [t.shape for t in weights.values()]
    outer = torch.nn.ModuleDict({"model": model})
    with pytest.raises(UserError, match=r"the weights to load.*memory\.orders=\[2, 3\]"):
        outer.load_state_dict({f"model.{name}": tensor for name, tensor in weights.items()})
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_network_takes_the_weights_of_one_without_memory() -> None:
    plain, model = tiny_transformer(), network(engram)
    result = model.load_state_dict(plain.state_dict(), strict=False)
    assert result.missing_keys and all("memory" in name for name in result.missing_keys)
    tokens = torch.randint(0, 40, (2, 9))
    assert torch.equal(model(tokens), plain(tokens)), "it starts as the same function"
