"""The command `prepare`: text files to token chunks."""

from mhc_lightning.cli.arguments import Arguments
from mhc_lightning.cli.composition import Experiment
from mhc_lightning.errors import UserError


def prepare(experiment: Experiment, arguments: Arguments) -> None:
    """Tokenize `input` into `output` with the settings of the section `prepare`.

    Raises:
        UserError: `input`, `output` or a setting is missing or wrong.
    """
    values = experiment.values()
    inputs, output = values["input"], values["output"]
    if not inputs:
        raise UserError("prepare needs input=FILE_OR_FOLDER (several: give input=… several times)")
    if not isinstance(output, str):
        raise UserError("prepare needs output=FOLDER, as data.path is a mixture of several")

    from mhc_lightning.cli.value_types import check_arguments
    from mhc_lightning.data import prepare as prepare_folder

    check_arguments("prepare", prepare_folder, values["prepare"])
    print(prepare_folder(inputs, output, overwrite=values["overwrite"], **values["prepare"]))
