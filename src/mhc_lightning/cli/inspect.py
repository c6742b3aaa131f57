"""`inspect`: the stream matrices and gains of one checkpoint."""

import contextlib
import json
import sys
from pathlib import Path

from mhc_lightning.cli.arguments import Arguments
from mhc_lightning.cli.fewer_collections import fewer_collections
from mhc_lightning.cli.inspected_checkpoint import LITERAL_KEYS, read_checkpoint
from mhc_lightning.errors import UserError


@fewer_collections()
def inspect(arguments: Arguments) -> None:
    """Print the gains of the checkpoint by sub-layer, and draw its matrices if asked to.

    Raises:
        UserError: there is no such checkpoint, nothing to see in it, or the text does not fit it.
    """
    if not arguments.paths or arguments.paths[0].partition("=")[0] in LITERAL_KEYS:
        raise UserError("inspect needs a checkpoint: inspect runs/mine/checkpoints/last")
    if arguments.print_config:
        raise UserError("--print-config belongs to the other commands")
    text = arguments.literal.get("input", [None])[-1]
    if text is not None and not text.strip():
        raise UserError('input= is empty; give a text, as in input="Once upon a time"')
    path = Path(arguments.paths[0]).expanduser()
    if not path.exists():
        raise UserError(f"no checkpoint at {path}")
    with contextlib.redirect_stdout(sys.stderr):
        checkpoint = read_checkpoint(path, text, arguments)
        if not checkpoint.layers:
            raise UserError(f"{path} has no connections to look at")

        from mhc_lightning.cli.inspection_report import as_json, as_text, draw
        from mhc_lightning.formatting import json_value
        from mhc_lightning.inspection import inspect_mappings

        inspection = inspect_mappings(checkpoint.layers)
        report = json.dumps(json_value(as_json(checkpoint, inspection))) if arguments.json else ""
        report = report or as_text(checkpoint, inspection)
        if "output" in arguments.literal:
            folder = Path(arguments.literal["output"][-1]).expanduser()
            number = draw(checkpoint, inspection, folder)
            print(f"drew {number} pictures in {folder}")
    print(report)
