"""Backends that tests of the operators run on."""

from collections.abc import Iterator

import pytest

from mhc_lightning.kernels import backend


@pytest.fixture(scope="module", params=["torch", "compiled"])
def cpu_kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each set of kernels that runs on a CPU, in turn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(backend.VARIABLE, request.param)
        yield request.param
