"""What the recipe trains."""

from dataclasses import dataclass

BASELINE, ALL, CONNECTIONS = "residual", "all", "connections"
_SLOWLY = ("optimizer.connection_lr_scale=5",)
_WIDE: dict[str, tuple[str, ...]] = {
    "hc": _SLOWLY,
    "mhc": (),
    "mhc_single_pass": (),
    "identity": (),
}


@dataclass(frozen=True)
class Variant:
    """One way to train the pretrained model on.

    Attributes:
        name: Its name.
        train: What learns: all, or connections.
        connection: The connection's name.
        words: Settings of its own.
    """

    name: str
    train: str
    connection: str
    words: tuple[str, ...] = ()


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(BASELINE, ALL, BASELINE),
        *(Variant(name, ALL, name, words) for name, words in _WIDE.items()),
        Variant("hc_fast", ALL, "hc"),  # with the learning rate of the others
        *(
            Variant(f"{CONNECTIONS}_{name}", CONNECTIONS, name, words)
            for name, words in _WIDE.items()
        ),
    )
}
