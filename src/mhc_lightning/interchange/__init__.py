"""Models exported and imported: safetensors folders, and the layout of DeepSeek-V4.

`exporting` writes a folder. `exported_model` opens a folder, and refuses a damaged one.
`compatibility` refuses other tensors. `model_settings` compares settings and builds networks.
`importing` makes a checkpoint.
"""

from mhc_lightning.interchange.exported_model import Exported, load_exported, open_exported
from mhc_lightning.interchange.exporting import export_model
from mhc_lightning.interchange.importing import import_model, weights_checkpoint

__all__ = [
    "Exported",
    "export_model",
    "import_model",
    "load_exported",
    "open_exported",
    "weights_checkpoint",
]
