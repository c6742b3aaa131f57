"""The command `import`: an exported model as a checkpoint that training starts from."""

import sys
from pathlib import Path

from mhc_lightning.cli.arguments import Arguments
from mhc_lightning.cli.composition import Experiment
from mhc_lightning.cli.run_folder import claim, delete_run, write_records
from mhc_lightning.errors import UserError
from mhc_lightning.files.run_layout import CHECKPOINTS


def import_model(experiment: Experiment, arguments: Arguments) -> None:
    """Make `output_dir` a run whose only checkpoint, of step 0, is the exported model `input`.

    Raises:
        UserError: A setting, the exported model or the folder is missing or wrong.
    """
    values = experiment.values()
    source = values["input"]
    if not source or len(source) != 1:
        raise UserError("import needs input=FOLDER, one that `export` wrote")

    from mhc_lightning.checkpoints.file_writing import write_checkpoint
    from mhc_lightning.checkpoints.names import LAST, checkpoint_name
    from mhc_lightning.cli.checkpoints import load_fitting
    from mhc_lightning.cli.components import build_model
    from mhc_lightning.files.atomic import point_link

    folder = Path(values["output_dir"])
    module = build_model(experiment, on_meta=True)  # for its shapes
    checkpoint = load_fitting(_folder(source[0]), module, experiment)
    claim(folder, resumes=False, overwrite=values["overwrite"])
    delete_run(folder)
    write_records(folder, experiment.record(), arguments.words)
    file = folder / CHECKPOINTS / checkpoint_name(0)
    try:
        write_checkpoint(checkpoint, file)
        point_link(file.parent / LAST, file.name)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from error
    print(f"wrote {file}: the weights of {source[0]}", file=sys.stderr)


def _folder(source: str) -> Path:
    path = Path(source).expanduser()
    if not path.is_dir():
        raise UserError(f"input={source} is no folder; name one that `export` wrote")
    return path
