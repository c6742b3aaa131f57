"""Scalars and pictures of TensorBoard event files, whoever wrote them."""

import math
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mhc_lightning.files.run_layout import EVENT_FILES

_PNG = b"\x89PNG"


@dataclass(frozen=True)
class Picture:
    """An image as it was logged.

    Attributes:
        step: Optimizer steps completed.
        png: The file's bytes.
        width: In pixels.
        height: In pixels.
    """

    step: int
    png: bytes
    width: int
    height: int


@dataclass
class Events:
    """What some event files hold.

    Attributes:
        scalars: By tag, values by step; what was written last counts.
        pictures: By tag, the newest one.
    """

    scalars: dict[str, dict[int, float]] = field(default_factory=dict)
    pictures: dict[str, Picture] = field(default_factory=dict)

    def forget_from(self, step: int) -> None:
        """Take back what a run had logged before it started again at `step`."""
        for points in self.scalars.values():
            for late in [s for s in points if s >= step]:
                del points[late]
        self.pictures = {t: p for t, p in self.pictures.items() if p.step < step}


def read_events(folder: Path, without: Container[str] = ()) -> Events:
    """What the event files directly in a folder hold; a cut end of a file is left out.

    Scalars may be written the way of torch (``simple_value``) or of TensorFlow 2 (tensors).

    Args:
        folder: The folder.
        without: Tags that are not wanted.
    """
    events = Events()
    for file in sorted(folder.glob(EVENT_FILES)):
        for event in _events(file):
            if (
                event.HasField("session_log")
                and event.session_log.status == event.session_log.START
            ):
                events.forget_from(event.step)
            for value in event.summary.value:
                if value.tag not in without:
                    _take(events, event.step, value)
    return events


def _events(file: Path) -> Iterator[Any]:
    from google.protobuf.message import DecodeError
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    try:
        for record in RawEventFileLoader(str(file)).Load():
            yield Event.FromString(record)
    except DecodeError:
        return


def _take(events: Events, step: int, value: Any) -> None:
    kind = value.WhichOneof("value")
    plugin = value.metadata.plugin_data.plugin_name
    if kind == "simple_value":
        events.scalars.setdefault(value.tag, {})[step] = float(value.simple_value)
    elif kind == "image":
        _keep(events, value.tag, step, value.image.encoded_image_string,
              value.image.width, value.image.height)  # fmt: skip
    elif kind == "tensor" and plugin == "scalars":
        number = _array(value.tensor)
        if number.size == 1 and number.dtype.kind in "fiub":
            events.scalars.setdefault(value.tag, {})[step] = float(number.reshape(()))
    elif kind == "tensor" and plugin == "images":
        width, height, *pictures = value.tensor.string_val
        if pictures:
            _keep(events, value.tag, step, pictures[0], int(width), int(height))


def _array(tensor: Any) -> Any:
    from tensorboard.util.tensor_util import make_ndarray

    return make_ndarray(tensor)


def _keep(events: Events, tag: str, step: int, png: bytes, width: int, height: int) -> None:
    newest = events.pictures.get(tag)
    if png.startswith(_PNG) and step >= (newest.step if newest else -math.inf):
        events.pictures[tag] = Picture(step, png, width, height)
