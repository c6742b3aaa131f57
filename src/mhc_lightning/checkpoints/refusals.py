"""Every reason for which a checkpoint is refused, and the function that decides it.

| reason | decided by |
|---|---|
| `ckpt_path` names nothing, or `last` has no sound checkpoint | `cli.checkpoints.find_checkpoint` |
| it is damaged: cut short, overwritten, a part missing, a wrong checksum | `fault_in` |
| it holds pickled objects and does not lie in the run's own folder | `load_error` |
| it cannot be loaded | `load_error` |
| it holds no model | `require_model` |
| it does not say how its model was built, or names a stranger's class | `rebuilding` |
| its memory is another one, or one of the two has none | `modules.memory.stored.check_memory` |
| tensors are missing, or of other names or shapes | `interchange.compatibility.check_tensors` |
| an exported model: damaged, of a newer form, built with other settings | `interchange` |
| its tokens are of another tokenizer | `cli.tokenizer.check_tokenizer` |
| its memory hashes other tokens alike | `cli.tokenizer.check_tokenizer`, `check_memory` |
| its optimizer is of another kind | `optimizers.resumed_settings.check_kind` |
| its optimizer is of other parameters | `optimizers.parameter_names.check_names` |
| its optimizer updates a memory's rows in another way | `optimizers.row_updates.RowState.load` |
| it was trained on other data | `data.resume.check_same_stream` |

Commands decide the reasons in this order, but in `fit` Lightning restores the data module before
the optimizer. `fit` reads no tokenizer from a checkpoint: its data bring one, which a memory is
bound to before it is compared.

Two refusals are not about loading: `cli.run_folder` refuses to overwrite a run, and
`optimizers.finiteness` refuses to save a state that is not finite.
"""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhc_lightning.checkpoints.folder_index import INDEX, RUN, missing_bytes, read_index
from mhc_lightning.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata


def fault_in(path: Path) -> str | None:
    """The fault of a checkpoint, a file or folder; None if it is sound.

    This function reads the whole checkpoint, because loading does not compare the tensors'
    checksums.
    """
    return _fault_in_folder(path) if path.is_dir() else _fault_in_file(path)


def load_error(path: Path, error: Exception) -> UserError:
    """The refusal of a file that torch does not load."""
    if "weights_only" in str(error) or "Unsupported" in str(error):
        return UserError(
            f"checkpoint {path} holds pickled Python objects, which could run code when"
            " loaded; if you trust where it comes from, copy it into the run's checkpoints/"
            " folder and load it from there, or in Python pass weights_only=False"
        )
    reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    return UserError(f"checkpoint {path} cannot be loaded: {reason}")


def require_model(path: Path, checkpoint: Any) -> None:
    """Refuse content that torch loads but that is no checkpoint.

    Raises:
        UserError: The content has no `state_dict`, or `state_dict` is no mapping.
    """
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"checkpoint {path} has no model in it (no `state_dict`)")
    if not isinstance(checkpoint["state_dict"], Mapping):
        raise UserError(f"checkpoint {path} has no model in it (its `state_dict` is no mapping)")


def _fault_in_file(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            names = archive.namelist()
    except zipfile.BadZipFile:
        size = path.stat().st_size
        return f"not a complete checkpoint (cut short or overwritten; {size} bytes)"
    except OSError as error:
        return f"unreadable ({error.strerror or error})"
    if damaged is not None:
        return f"damaged: {damaged} does not match its checksum"
    if not any(name.endswith("data.pkl") for name in names):
        return "not a torch checkpoint"
    return None


def _fault_in_folder(path: Path) -> str | None:
    for name in (INDEX, RUN):
        if not (path / name).is_file():
            return f"not a complete checkpoint ({name} is missing)"
    fault = _fault_in_file(path / RUN)
    if fault:
        return f"damaged: {RUN} is {fault}"
    try:
        index = read_index(path)
        return missing_bytes(path, index) or _wrong_checksum(path, index)
    except ValueError as error:
        return f"damaged: {error}"
    except OSError as error:
        return f"unreadable ({error.strerror or error})"


def _wrong_checksum(folder: Path, index: "Metadata") -> str | None:
    parts = sorted((p.relative_path, p.offset, p.length) for p in index.storage_data.values())
    for name, offset, length in parts:
        with open(folder / name, "rb") as file:
            file.seek(offset)
            content = io.BytesIO(file.read(length))  # torch.save has written each tensor
        try:
            with zipfile.ZipFile(content) as archive:
                damaged = archive.testzip()
        except zipfile.BadZipFile:
            damaged = "a tensor"
        if damaged is not None:
            return f"damaged: {damaged} in {name} does not match its checksum"
    return None
