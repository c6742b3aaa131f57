"""Predictions of a run from its settings: parameters, memory, traffic and time.

This package imports the modules and the optimizer recipes, not Lightning or the command line.
"""

from mhc_lightning.planning.data_parallel import DataParallel, RowTraining
from mhc_lightning.planning.errors import NotPlannableError
from mhc_lightning.planning.expert_parallel import ExpertParallel
from mhc_lightning.planning.machine import Machine, machine_of, this_machine
from mhc_lightning.planning.measured_times import MeasuredTimes, read_times
from mhc_lightning.planning.pipeline import Pipeline, PipelineForecast
from mhc_lightning.planning.plan import Plan, make_plan, with_schedules
from mhc_lightning.planning.planned_run import PlannedRun
from mhc_lightning.planning.precision import precision_of
from mhc_lightning.planning.remedies import remedies
from mhc_lightning.planning.shapes_only import ShapesOnly

__all__ = [
    "DataParallel",
    "ExpertParallel",
    "Machine",
    "MeasuredTimes",
    "NotPlannableError",
    "Pipeline",
    "PipelineForecast",
    "Plan",
    "PlannedRun",
    "RowTraining",
    "ShapesOnly",
    "machine_of",
    "make_plan",
    "precision_of",
    "read_times",
    "remedies",
    "this_machine",
    "with_schedules",
]
