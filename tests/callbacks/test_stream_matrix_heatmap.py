"""Heat maps of matrices and products: which are drawn, and of what."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mhc_lightning.callbacks import StreamMatrixHeatmap
from mhc_lightning.callbacks import stream_matrix_heatmap as subject
from mhc_lightning.errors import UserError


def images(events: Any) -> set[str]:
    return {tag.removeprefix("stream_matrices/") for tag in events().Tags()["images"]}


def test_draws_first_middle_last_and_the_products(foreign: Any, fit: Any, events: Any) -> None:
    fit(foreign.Module(layers=6), StreamMatrixHeatmap(), log_every_n_steps=2, max_steps=3)
    assert images(events) == {
        "layer_0", "layer_3", "layer_5",
        "composite_0_to_2", "composite_3_to_5", "composite_0_to_5",
    }  # fmt: skip
    for tag in events().Tags()["images"]:
        first, event = events().Images(tag)
        assert (first.step, event.step) == (2, 3)  # the first logging step, and the last step
        picture = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
        assert picture.shape == (event.height, event.width, 3)
        assert picture.std() > 10  # something is drawn


def test_a_short_stack_has_no_halves(foreign: Any, fit: Any, events: Any) -> None:
    fit(foreign.Module(layers=2), StreamMatrixHeatmap(every_n_steps=2), max_steps=2)
    assert images(events) == {"layer_0", "layer_1", "composite_0_to_1"}


def test_chosen_layers_may_count_from_the_end(foreign: Any, fit: Any, events: Any) -> None:
    fit(foreign.Module(layers=4), StreamMatrixHeatmap([1, -1]), max_steps=2)
    assert {name for name in images(events) if name.startswith("layer")} == {"layer_1", "layer_3"}


def test_a_layer_that_does_not_exist_is_a_user_error(foreign: Any, fit: Any) -> None:
    with pytest.raises(UserError, match="layers holds 7, but the model has 3 sub-layers"):
        fit(foreign.Module(layers=3), StreamMatrixHeatmap([0, 7]), max_steps=2)


def test_draws_the_means_of_per_token_products(
    foreign: Any, fit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, np.ndarray] = {}
    draw = subject.matrix_heatmap

    def note(matrix: np.ndarray, title: str, step: int) -> np.ndarray:
        drawn[title] = matrix
        return draw(matrix, title, step)

    monkeypatch.setattr(subject, "matrix_heatmap", note)
    records: list[torch.Tensor] = []

    class Noting(foreign.Mixer):
        def mappings(self, streams: torch.Tensor) -> Any:
            result = super().mappings(streams)
            records.append(result.residual.detach().double().flatten(0, 1))
            return result

    module = foreign.Module(layers=0)
    module.mixers = torch.nn.ModuleList(Noting(2, 4) for _ in range(3))
    fit(module, StreamMatrixHeatmap(every_n_steps=1), max_steps=1)
    first, second, third = records[:3]
    whole = torch.stack([c @ b @ a for a, b, c in zip(first, second, third, strict=True)]).mean(0)
    np.testing.assert_allclose(drawn["Sub-layers 0 to 2, product"], whole, rtol=1e-5)
    np.testing.assert_allclose(drawn["Sub-layer 1 of 3"], second.mean(0), rtol=1e-5)
