import pytest

from mhc_lightning.cli.main import main
from mhc_lightning.cli.tune import workloads_of
from mhc_lightning.modules import (
    HyperConnection,
    KroneckerHyperConnection,
    ManifoldHyperConnection,
    SinglePassHyperConnection,
)


def test_without_a_gpu_there_is_one_clear_line(capfd, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["tune", "--config", "mhc_3b"]) == 2
    output, errors = capfd.readouterr()
    assert output == ""
    (line,) = errors.splitlines()
    assert line.startswith("error: tune measures on a GPU") and "run it where you train" in line


def test_the_residual_connection_has_nothing_to_tune(capfd, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert main(["tune", "--config", "baseline_3b"]) == 2
    assert "nothing to tune" in capfd.readouterr()[1].splitlines()[-1]


@pytest.mark.parametrize(
    "connection",
    [
        HyperConnection,
        ManifoldHyperConnection,
        SinglePassHyperConnection,
        KroneckerHyperConnection,
    ],
)
def test_a_connection_is_tuned_with_its_own_kernels(connection):
    import torch

    from mhc_lightning.kernels.triton.workloads import workloads

    names = workloads_of(connection(dim=16, num_streams=2, layer_index=0))
    work = workloads(1, 2, 16, torch.float32)
    assert set(names) <= set(work)
    kernels = [work[name].kernel for name in names]
    assert len(kernels) == len(set(kernels))  # none is tuned twice
    expected = [name for name in names if "per_stream" in name or "single_pass" in name]
    assert bool(expected) == (connection in (HyperConnection, SinglePassHyperConnection))
    assert ("coefficients_forward" in names) == issubclass(connection, ManifoldHyperConnection)
