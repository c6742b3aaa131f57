"""Scalars and pictures read from TensorBoard event files, whichever program wrote them."""

import math
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mhc_lightning.files.run_layout import EVENT_FILES

_PNG = b"\x89PNG"


@dataclass(frozen=True)
class Picture:
    """A logged image.

    Attributes:
        step: Optimizer steps completed.
        png: The bytes of a PNG file.
        width: In pixels.
        height: In pixels.
    """

    step: int
    png: bytes
    width: int
    height: int


@dataclass
class Events:
    """The contents of some event files.

    Attributes:
        scalars: By tag, values by step; a step that was logged twice has the later value.
        pictures: By tag, the newest one.
    """

    scalars: dict[str, dict[int, float]] = field(default_factory=dict)
    pictures: dict[str, Picture] = field(default_factory=dict)

    def drop_from(self, step: int) -> None:
        """Remove everything from `step` on: the run was restarted there."""
        for points in self.scalars.values():
            for late in [s for s in points if s >= step]:
                del points[late]
        self.pictures = {t: p for t, p in self.pictures.items() if p.step < step}

    def add(self, step: int, value: Any) -> None:
        """Add a `Summary.Value` in the format of torch or of TensorFlow 2 (tensors)."""
        kind = value.WhichOneof("value")
        plugin = value.metadata.plugin_data.plugin_name
        if kind == "simple_value":
            self._add_scalar(value.tag, step, value.simple_value)
        elif kind == "image":
            image = value.image
            png = image.encoded_image_string
            self._add_picture(value.tag, Picture(step, png, image.width, image.height))
        elif kind == "tensor" and plugin == "scalars":
            number = _array(value.tensor)
            if number.size == 1 and number.dtype.kind in "fiub":
                self._add_scalar(value.tag, step, number.reshape(()))
        elif kind == "tensor" and plugin == "images":
            width, height, *pictures = value.tensor.string_val
            if pictures:
                self._add_picture(value.tag, Picture(step, pictures[0], int(width), int(height)))

    def _add_scalar(self, tag: str, step: int, value: Any) -> None:
        self.scalars.setdefault(tag, {})[step] = float(value)

    def _add_picture(self, tag: str, picture: Picture) -> None:
        newest = self.pictures[tag].step if tag in self.pictures else -math.inf
        if picture.png.startswith(_PNG) and picture.step >= newest:
            self.pictures[tag] = picture


def read_events(folder: Path, without: Container[str] = ()) -> Events:
    """Read the event files directly in a folder; the truncated end of a file is left out.

    Args:
        folder: The folder.
        without: Tags to leave out.
    """
    events = Events()
    for file in sorted(folder.glob(EVENT_FILES)):
        for event in _read_file(file):
            session = event.session_log
            if event.HasField("session_log") and session.status == session.START:
                events.drop_from(event.step)
            for value in event.summary.value:
                if value.tag not in without:
                    events.add(event.step, value)
    return events


def _read_file(file: Path) -> Iterator[Any]:
    from google.protobuf.message import DecodeError
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    try:
        for record in RawEventFileLoader(str(file)).Load():
            yield Event.FromString(record)
    except DecodeError:
        return


def _array(tensor: Any) -> Any:
    from tensorboard.util.tensor_util import make_ndarray

    return make_ndarray(tensor)
