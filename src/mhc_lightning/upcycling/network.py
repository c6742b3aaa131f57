"""The networks that a `LanguageModel` trains."""

from mhc_lightning.modules import Transformer
from mhc_lightning.upcycling.pretrained_network import PretrainedNetwork

Network = Transformer | PretrainedNetwork
