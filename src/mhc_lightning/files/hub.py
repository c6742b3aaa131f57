"""Files of the Hugging Face hub, fetched or taken from its cache."""

import re
from functools import lru_cache
from pathlib import Path

from mhc_lightning.errors import UserError, one_line_message

_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def is_hub_name(given: str) -> bool:
    """True if `given` is no path that exists and could be a name on the hub."""
    return _NAME.fullmatch(given) is not None and not Path(given).exists()


@lru_cache  # once in a process: the hub would be asked each time
def hub_folder(name: str, patterns: tuple[str, ...], what: str) -> Path:
    """The folder in the hub's cache with the files of a name, newly fetched where they can be.

    Without a connection the files of an earlier fetch are taken, without further attempts.

    Args:
        name: Such as `HuggingFaceTB/SmolLM2-135M`.
        patterns: Shell patterns of the files.
        what: The setting that names it, for the error message.

    Raises:
        UserError: The hub has no such name, or cannot be reached and the cache has not the files.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise UserError(
            f"{what}={name} is gated on the hub; ask for access on its page, and log in (hf auth"
            " login)"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{what}={name} is not here, nor on the hub; check the name, or log in if it is"
            " private (hf auth login)"
        ) from error
    except Exception as error:  # the errors of several libraries
        raise UserError(
            f"{what}={name} is not here, and the hub cannot be reached"
            f" ({one_line_message(error).split('. ')[0]}); fetch it where there is a network (hf"
            f" download {name}) and give the folder"
        ) from error
