"""What saved weights say of their memory, and in what it differs from a network's memory.

Hashes, sizes and tokenizer are in the constants that every checkpoint holds. They are compared by
content, and named as settings.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from mhc_lightning.errors import UserError
from mhc_lightning.modules.memory.hashing import NOT_A_TOKEN, NgramHash
from mhc_lightning.modules.memory.memory import INPUT, Memory

MEMORY = "memory."  # of a memory's constants within a network
_HASH = f"{MEMORY}hash."
_CONSTANTS = ("classes", "multipliers", "moduli", "pad", "document_end", "orders", "tables")
_NONE = "none"


def check_memory(memory: Memory, saved: Mapping[str, Tensor], source: str, hint: str = "") -> None:
    """Compare the memory of saved weights with that of a network, of which a part is enough.

    Args:
        memory: The network's memory; its device does not matter. If it is bound, the tokenizers
            are compared, too.
        saved: The whole state dict of a network, or the memory's part of it. Of the constants,
            which are below `memory.`, values are needed, of all else names and shapes.
        source: Name of the file, folder or model that holds the weights, for the message.
        hint: A way to fix the mismatch, for the message.

    Raises:
        UserError: Names what differs.
    """
    differing = memory_differences(memory, saved)
    if differing:
        raise UserError(
            f"the memory of {source} is not that of the model: {', '.join(differing)}"
            f"{hint and '; ' + hint}"
        )


def check_loaded(
    network: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *_: Any
) -> None:
    """A hook of a network's `load_state_dict`: see `check_memory`.

    It leaves it to torch to name the tensors where one of the two has no memory.
    """
    saved = {n.removeprefix(prefix): t for n, t in state_dict.items() if n.startswith(prefix)}
    if has_memory(saved) and not saved[f"{_HASH}classes"].is_meta:
        memory = network.get_submodule(MEMORY.rstrip("."))
        assert isinstance(memory, Memory)
        check_memory(memory, saved, "the weights to load")


def has_memory(saved: Mapping[str, Tensor]) -> bool:
    """True if saved weights are those of a network with a memory."""
    return f"{_HASH}classes" in saved


def belongs_to_memory(name: str) -> bool:
    """True if a tensor of a network, by its name, is a part of its memory."""
    parts = name.split(".")
    ends = ("memory", "input_memory", "head_memory")
    return parts[0] in ends or (parts[0] == "blocks" and "memory" in parts)


def memory_differences(memory: Memory, saved: Mapping[str, Tensor]) -> list[str]:
    """What differs, each as `setting=saved value (not the network's value)`: see `check_memory`."""
    kinds = _kind_of_names(saved), _kind_of_memory(memory)
    if kinds[0] != kinds[1]:
        return [f"memory={kinds[0]} (not {kinds[1]})"]
    hashing = memory.hash
    if hashing is None:
        return []
    constants = {name: _numpy(saved, f"{_HASH}{name}") for name in _CONSTANTS}
    missing = [name for name, value in constants.items() if value is None]
    if missing:
        return [f"{_HASH}{missing[0]} is missing (not of this version)"]
    theirs = {name: value for name, value in constants.items() if value is not None}
    return (
        _layout_differences(memory, hashing, theirs, saved)
        or _seed_difference(hashing, theirs)
        or _tokenizer_differences(memory, hashing, theirs)
    )


def _numpy(saved: Mapping[str, Tensor], name: str) -> np.ndarray | None:
    return saved[name].cpu().numpy() if name in saved else None


def _kind_of_names(saved: Mapping[str, Tensor]) -> str:
    if not has_memory(saved):
        return _NONE
    return "over_encoding" if any(n.startswith("input_memory.") for n in saved) else "engram"


def _kind_of_memory(memory: Memory) -> str:
    if memory.hash is None:
        return _NONE
    return "over_encoding" if INPUT in memory.places else "engram"


def _layout_differences(
    memory: Memory,
    hashing: NgramHash,
    theirs: Mapping[str, np.ndarray],
    saved: Mapping[str, Tensor],
) -> list[str]:
    layout, ours = hashing.layout, hashing.constants()
    if len(theirs["classes"]) != len(ours["classes"]):
        return [f"model.vocab_size={len(theirs['classes'])} (not {len(ours['classes'])})"]
    pairs: dict[str, tuple[Any, Any]] = {
        "layers": (theirs["tables"].tolist(), list(layout.tables)),
        "orders": (np.unique(theirs["orders"]).tolist(), list(layout.orders)),
        "num_heads": (_heads_of_first_order(theirs["orders"]), layout.num_heads),
    }
    if theirs["multipliers"].ndim != ours["multipliers"].ndim:
        names = {2: "multiply_xor", 3: "polynomial"}
        pairs["hash"] = names.get(theirs["multipliers"].ndim), hashing.scheme
    shapes = _shape_settings(memory, saved, _heads_of_first_order(theirs["orders"]))
    for name, value in shapes.items():
        pairs[name] = value, memory.shape_settings[name]
    differing = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if not differing and not np.array_equal(theirs["moduli"], ours["moduli"]):
        differing["rows"] = _rows(theirs["moduli"], hashing), _rows(ours["moduli"], hashing)
    return [f"memory.{name}={a} (not {b})" for name, (a, b) in differing.items()]


def _heads_of_first_order(orders: np.ndarray) -> int:
    return int((orders == orders[0]).sum())


def _rows(moduli: np.ndarray, hashing: NgramHash) -> int | list[int]:
    """A setting that gives these rows: those of the first head, or of the first of each order."""
    first = [int(rows) for rows in moduli[0, :: hashing.layout.num_heads]]
    return first[0] if hashing.scheme == "polynomial" else first


def _shape_settings(memory: Memory, saved: Mapping[str, Tensor], num_heads: int) -> dict[str, Any]:
    """The settings of `memory.shape_settings` as the saved tensors show them."""
    found: dict[str, Any] = {}
    names = [name for name in saved if belongs_to_memory(name)]
    tables = [name for name in names if name.endswith("memory.table.weight")]
    if "dim" in memory.shape_settings and tables:
        found["dim"] = saved[tables[0]].shape[1] * num_heads
    if "conv" in memory.shape_settings:
        found["conv"] = any(name.endswith("memory.conv.weight") for name in names)
        taps = [
            saved[name].shape[0] // saved[f"{name.removesuffix('weight')}norm"].shape[0]
            for name in names
            if name.endswith("memory.conv.weight")
        ]
        if taps and "conv_kernel" in memory.shape_settings:
            found["conv_kernel"] = taps[0]
    if "bias" in memory.shape_settings:
        found["bias"] = any(name.endswith("memory.value.bias") for name in names)
    if "word_scale" in memory.shape_settings:
        divisor = _numpy(saved, f"{MEMORY}word_divisor")
        found["word_scale"] = "full" if divisor is None or divisor[0] == 1 else "mean"
    if "over_decoding_weight" in memory.shape_settings:
        has_head = any(name.startswith("head_memory.") for name in names)
        found["over_decoding_weight"] = "above 0" if has_head else "0"
    return found


def _seed_difference(hashing: NgramHash, theirs: Mapping[str, np.ndarray]) -> list[str]:
    """The multipliers that do not follow from the network's seed and the saved classes."""
    ours = hashing.multipliers_for(int(theirs["classes"].max()) + 1)
    if np.array_equal(theirs["multipliers"], ours):
        return []
    return [
        f"memory.multipliers={theirs['multipliers'].tolist()} (not {ours.tolist()}, of"
        f" memory.seed={hashing.seed})"
    ]


def _tokenizer_differences(
    memory: Memory, hashing: NgramHash, theirs: Mapping[str, np.ndarray]
) -> list[str]:
    ours = hashing.bound_constants()
    if ours is None:
        return []
    found = []
    others = int((theirs["classes"] != ours["classes"]).sum())
    plain = [_is_uncompressed(constants) for constants in (theirs, ours)]
    if others and plain[0] != plain[1]:
        found.append(f"memory.compress={not plain[0]} (not {memory.compress})")
    elif others:
        count = len(ours["classes"])
        found.append(f"another tokenizer, with {others} of {count} tokens of another class")
    ends = [max(NOT_A_TOKEN, int(constants["document_end"][0])) for constants in (theirs, ours)]
    if ends[0] != ends[1] and NOT_A_TOKEN in ends:
        found.append(f"memory.documents={ends[0] != NOT_A_TOKEN} (not {memory.documents})")
    elif ends[0] != ends[1]:
        found.append(f"another tokenizer, whose documents end with token {ends[0]} (not {ends[1]})")
    pads = [int(constants["pad"][0]) for constants in (theirs, ours)]
    if not found and pads[0] != pads[1]:
        found.append(f"memory.pad_token, a token of class {pads[0]} (not {pads[1]})")
    return found


def _is_uncompressed(constants: Mapping[str, np.ndarray]) -> bool:
    """True if every token is its own class, but for those that no tokenizer gives."""
    classes = constants["classes"]
    own = classes == np.arange(len(classes))
    return bool((own | (classes == constants["pad"][0])).all())
