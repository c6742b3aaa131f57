"""The command `export`: the weights of a checkpoint as safetensors."""

import sys
from collections.abc import Callable
from typing import Any

from mhc_lightning.cli.arguments import Arguments
from mhc_lightning.cli.composition import Experiment
from mhc_lightning.errors import UserError


def export(experiment: Experiment, arguments: Arguments) -> None:
    """Write `ckpt_path` as safetensors into the new folder `output`.

    Raises:
        UserError: A setting, the checkpoint, the tokenizer or the folder is missing or wrong.
    """
    values = experiment.values()
    if "output" not in experiment.literal:
        raise UserError("export needs output=FOLDER, the new folder to write")
    if values["ckpt_path"] is None:
        raise UserError("export needs ckpt_path=last, ckpt_path=best or a checkpoint")

    from mhc_lightning.checkpoints.saved_tensors import below
    from mhc_lightning.cli.checkpoints import load_fitting, require_checkpoint, trained_steps
    from mhc_lightning.cli.components import build_model
    from mhc_lightning.cli.instantiation import target_of
    from mhc_lightning.cli.tokenizer import tokenizer_of
    from mhc_lightning.cli.value_types import check_arguments
    from mhc_lightning.data.document_mask import keeps_documents_apart
    from mhc_lightning.upcycling import PretrainedNetwork

    settings = dict(values["export"])
    target = target_of(experiment, "model")
    upcycled = isinstance(target, type) and issubclass(target, PretrainedNetwork)
    export_as = _exporter(settings.pop("form"), upcycled)
    check_arguments("export", export_as, settings)
    path = require_checkpoint(experiment)
    module = build_model(experiment, on_meta=True)  # for its shapes
    checkpoint = load_fitting(path, module, experiment)
    tokenizer = tokenizer_of(experiment, checkpoint, path, module.model)
    settings |= {"tokenizer": tokenizer, "overwrite": values["overwrite"]}
    if upcycled:
        module.start_from(checkpoint["state_dict"])
        export_as(
            module.model.network, values["output"], pretrained=module.model.pretrained, **settings
        )
    else:
        export_as(
            below(checkpoint["state_dict"], "model."),
            values["output"],
            settings=values["model"],
            step=trained_steps(checkpoint),
            document_mask=keeps_documents_apart(checkpoint),
            **settings,
        )
    print(f"wrote {values['output']}: the weights of {path}", file=sys.stderr)


def _exporter(form: Any, upcycled: bool) -> Callable[..., None]:
    """The function that writes a folder of `export.form`.

    Raises:
        UserError: There is no such form (of an upcycled model), or it needs an extra that is not
            installed.
    """
    if form not in ("mhc_lightning", "huggingface"):
        raise UserError(f"export.form must be mhc_lightning or huggingface, not {form}")
    if form == "huggingface":
        import mhc_lightning.huggingface  # noqa: F401  (refuses to be imported without the extra)
        from mhc_lightning.huggingface.folders import export_for_huggingface, export_upcycled

        return export_upcycled if upcycled else export_for_huggingface
    if upcycled:
        raise UserError(
            "export.form=mhc_lightning holds models of this package's Transformer, and this one is"
            " made from a pretrained model; export it with form=huggingface"
        )
    from mhc_lightning.interchange import export_model

    return export_model
