"""The bytes of a step, against those counted in a run of four gloo processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import counted_bytes_in_processes as counted
import pytest

from mhc_lightning.planning import (
    DataParallel,
    ExpertParallel,
    PlannedRun,
    machine_of,
    precision_of,
)
from mhc_lightning.planning.pipeline import Pipeline
from mhc_lightning.planning.stages import cut_network
from mhc_lightning.planning.step_traffic import step_traffic


def a_run(replicas, **changes):
    sizes = counted.SEQUENCES, counted.LENGTH
    settings = {
        "batch_size": sizes[0] * replicas.devices,
        "micro_batch_size": sizes[0],
        "sequence_length": sizes[1],
        "max_steps": 1,
        "precision": precision_of("32-true"),
        "replicas": replicas,
        "state_per_value": lambda model, parameter: 2,
    }
    return PlannedRun(**{**settings, **changes})


def test_bytes_are_those_that_four_processes_send(tmp_path):
    """Two groups of two share experts; FSDP2 shares experts over two, and all else over four."""
    processes, spread = 4, 2
    command = [sys.executable, counted.__file__]
    running = [
        subprocess.Popen(
            [*command, *map(str, (rank, processes, spread, tmp_path))],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    for process in running:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    found = [json.loads(Path(tmp_path / f"{k}.json").read_text()) for k in range(processes)]

    replicas = DataParallel(processes, sharded=True, experts=ExpertParallel(spread, 1.0))
    traffic = step_traffic(counted.network(), a_run(replicas), machine_of("4xh200"))
    for each in found:
        # FSDP2 pads parameters that it cannot cut evenly.
        assert each["gathered"] + each["reduced"] == pytest.approx(traffic.sharing, rel=1e-3)
        assert each["gathered"] == pytest.approx(2 * each["reduced"])
    # Half of the rows stay, if every expert is as likely; all rows together are counted exactly.
    rows = sum(each["rows"] for each in found)
    assert rows / processes * (spread - 1) / spread == traffic.experts.node
    assert traffic.experts.network == traffic.stages == 0


def test_stages_send_streams_forward_and_their_gradients_back():
    model = counted.network()
    plan = cut_network(model, schedule="gpipe", devices=3)
    replicas = DataParallel(2, sharded=True, pipeline_size=3)
    run = a_run(replicas, micro_batch_size=4, batch_size=16, pipeline=Pipeline(plan, 2))
    traffic = step_traffic(model, run, machine_of("6xh200"))
    streams = 2 * counted.LENGTH * 4 * 32 * 4  # sequences, tokens, n, C, bytes
    # Two boundaries, two directions, two passes of two micro-batches, over three devices.
    assert traffic.stages == pytest.approx(2 * 2 * 4 * streams / 3)
    assert traffic.experts == (0, 0)
