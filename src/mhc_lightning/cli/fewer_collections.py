"""Python's garbage collector, held back while a command starts."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_OBJECTS = 50_000  # new ones between two collections; 700 is Python's own number


@contextmanager
def fewer_collections() -> Iterator[None]:
    """Within, look for garbage rarely.

    What a command imports are some 450,000 objects, nearly all of which stay. Going through them
    again and again to find that out is a fifth of the time of the imports. A run of many steps is
    to begin after this: garbage of steps may hold large tensors. Also a decorator.
    """
    before = gc.get_threshold()
    gc.set_threshold(_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextmanager
def set_aside() -> Iterator[None]:
    """Within, garbage is looked for only among objects that are made from now on.

    A full collection goes through all that was imported, a third of a second each time.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
