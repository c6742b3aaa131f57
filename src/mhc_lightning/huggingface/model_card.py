"""The README of a folder that transformers reads."""

from pathlib import Path

_CARD_FILE = "README.md"
_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [mhc-lightning]
---

A language model with n residual streams, trained with mhc-lightning
(`pip install "mhc-lightning[huggingface]"`). Importing `mhc_lightning.huggingface` is what lets
transformers read it:

```python
import mhc_lightning.huggingface
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this folder, or its name on the hub")
tokenizer = AutoTokenizer.from_pretrained("this folder, or its name on the hub")
```
"""


def write_card(folder: Path) -> None:
    """Write a model card that says what to import, unless the folder has one."""
    if not (folder / _CARD_FILE).exists():
        (folder / _CARD_FILE).write_text(_CARD, encoding="utf-8")
