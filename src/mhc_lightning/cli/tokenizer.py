"""The tokenizer of a checkpoint, and the refusal of any other one."""

from typing import TYPE_CHECKING, Any

from mhc_lightning.checkpoints.saved_memory import check_saved_memory, memory_in
from mhc_lightning.cli.composition import Experiment
from mhc_lightning.data.document_mask import keep_documents_apart, keeps_documents_apart
from mhc_lightning.data.model_tokenizer import tokenizer_of_model
from mhc_lightning.data.token_classes import bind_tokenizer
from mhc_lightning.data.tokenizers import Tokenizer, load_tokenizer
from mhc_lightning.errors import UserError
from mhc_lightning.interchange.exported_model import is_exported, open_exported

if TYPE_CHECKING:
    from mhc_lightning.modules import Transformer


def tokenizer_of(
    experiment: Experiment, checkpoint: dict[str, Any], path: Any, network: "Transformer"
) -> Tokenizer:
    """The tokenizer for a checkpoint.

    It is the tokenizer that `data.tokenizer` names; else that of the exported model, if the
    checkpoint is one; else that of the data at `data.path`; else that of the pretrained model, if
    the network was made from one.

    Args:
        experiment: The experiment.
        checkpoint: The loaded checkpoint.
        path: The file or folder of the checkpoint.
        network: The network, into which the checkpoint is not loaded yet.

    Raises:
        UserError: As `check_tokenizer`; or nothing names a tokenizer.
    """
    values = experiment.values()
    configured = values["data"]["tokenizer"]
    if configured is not None:
        ends = values["prepare"]
        tokenizer = load_tokenizer(configured, ends["end_of_document"], ends["begin_of_document"])
    elif is_exported(path):
        tokenizer = open_exported(path).tokenizer()
    else:
        from mhc_lightning.cli.components import build_data

        data = build_data(experiment, world_size=1)
        found = data.tokenizer
        pretrained = getattr(network, "pretrained", None)
        if found is None and pretrained is not None:
            found = tokenizer_of_model(pretrained)
        if found is None:
            raise UserError(
                f"{data.sources[0].path} does not say which tokenizer its tokens were made with;"
                " name it with data.tokenizer=…"
            )
        tokenizer = found
    check_tokenizer(tokenizer, checkpoint, path, network)
    return tokenizer


def check_tokenizer(
    tokenizer: Tokenizer | None, checkpoint: dict[str, Any], path: Any, network: "Transformer"
) -> None:
    """Check that a checkpoint was trained with a tokenizer, and bind the network to it.

    A network that was trained with `data.document_mask` keeps documents apart from here on.
    None is no tokenizer: the checkpoint must have been trained on token data without one.

    What a memory keeps of its tokenizer is compared by content: another version of the `tokenizers`
    library may find other tokens alike.

    Raises:
        UserError: It was trained with another one, or the tokenizer has more ids than the model.
    """
    vocab_size = network.vocab_size
    recorded = checkpoint.get("tokenizer")
    if recorded is None:
        recorded = checkpoint.get("TextDataModule", {}).get("data", {}).get("tokenizer")
    if tokenizer is None:
        if recorded is not None:
            raise UserError(
                f"tokenizer mismatch: {path} was trained with the tokenizer {recorded}, and the"
                " data do not say theirs; name it with data.tokenizer=…"
            )
    elif recorded is not None and recorded != tokenizer.fingerprint:
        raise UserError(
            f"tokenizer mismatch: {path} was trained with the tokenizer {recorded}, and"
            f" {tokenizer.name!r} is {tokenizer.fingerprint}; name the right one with"
            " data.tokenizer=…, or data prepared with it with data.path=…"
        )
    elif tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"tokenizer mismatch: {tokenizer.name!r} has {tokenizer.vocab_size} ids but"
            f" model.vocab_size={vocab_size}"
        )
    memory = memory_in(network)
    if tokenizer is not None:
        bind_tokenizer(memory, tokenizer)
    elif not memory.is_bound:
        memory.bind_alone()
    hint = "use the tokenizer it was trained with"
    check_saved_memory(memory, checkpoint["state_dict"], str(path), hint)
    if tokenizer is not None and keeps_documents_apart(checkpoint):
        keep_documents_apart(network, tokenizer.end_of_document)
