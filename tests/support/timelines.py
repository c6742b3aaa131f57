"""Timelines of schedules whose stages are alike."""

from mhc_lightning.planning.schedule_order import schedule_order
from mhc_lightning.planning.simulation import simulate
from mhc_lightning.planning.stages import SCHEDULES, plan_stages


def stages(schedule, devices, per_device=None):
    per_device = per_device or SCHEDULES[schedule].stages_per_device or 2
    sizes = [1] * (devices * per_device)
    return plan_stages(
        [1.0] * len(sizes), schedule=schedule, devices=devices, blocks_per_stage=sizes
    )


def timeline(plan, micro_batches, times, transfers=None, *, overlapped=True):
    count = len(plan.blocks)
    times = times if isinstance(times, list) else [times] * count
    order = schedule_order(plan, micro_batches)
    transfers = transfers or [0.0] * (count - 1)
    return simulate(plan, order, times, transfers, overlapped=overlapped)


def idle(line):
    return [line.seconds - line.busy(device) for device in range(line.devices)]
