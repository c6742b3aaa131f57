"""The command `report`: runs read back from their folders, on one page or as JSON."""

import json
from pathlib import Path

from mhc_lightning.cli.arguments import Arguments
from mhc_lightning.cli.fewer_collections import fewer_collections
from mhc_lightning.errors import UserError


@fewer_collections()
def report(arguments: Arguments) -> None:
    """Write the page and its figures, and print its place; or print the numbers as JSON.

    Raises:
        UserError: No runs are given, or they cannot be compared.
    """
    if not arguments.paths:
        raise UserError("report needs the folders of runs (what `fit` calls output_dir)")
    if arguments.config is not None or arguments.print_config:
        raise UserError("report takes no --config: settings are read from the runs' folders")

    from mhc_lightning.reporting.report import make_report
    from mhc_lightning.reporting.report_folder import write_report
    from mhc_lightning.reporting.report_json import report_values

    baseline, output = (arguments.literal.get(key, [None])[-1] for key in ("baseline", "output"))
    made = make_report(arguments.paths, baseline)
    page = write_report(made, Path(output or "report").expanduser())
    if arguments.json:
        print(json.dumps({"page": str(page), **report_values(made)}))
        return
    width = max(len(summary.run.name) for summary in made.summaries)
    for summary, verdict in zip(made.summaries, made.verdicts, strict=True):
        first = verdict.sentences[0] if verdict.sentences else summary.ending.sentence
        print(f"{summary.run.name:<{width}}  {verdict.label}. {first}")
    print(f"wrote {page}")
