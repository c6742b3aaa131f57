"""An adapter in the shape that peft gives its own."""

from torch import Tensor, nn


class LowRankAdapter(nn.Module):
    """``base_layer(x)`` plus a product of rank 2; ``weight`` is the base layer's, as in peft."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_a = nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_b = nn.Linear(2, base_layer.out_features, bias=False)
        nn.init.zeros_(self.lora_b.weight)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_b(self.lora_a(x))


def adapt(module: nn.Module) -> list[LowRankAdapter]:
    """Put an adapter around every linear layer inside, as peft does; base layers are frozen."""
    adapters = []
    module.requires_grad_(False)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                adapters.append(LowRankAdapter(child))
                setattr(parent, name, adapters[-1])
    return adapters
