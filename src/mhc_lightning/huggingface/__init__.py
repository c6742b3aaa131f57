"""Models of this package as models of Hugging Face's transformers (the extra `huggingface`).

Importing this package registers `MhcConfig` and `MhcForCausalLM` with transformers' Auto classes.
`AutoModelForCausalLM.from_pretrained` then reads the folders of `export form=huggingface`.

`config` describes a model, `causal_lm` computes, `cache` keeps the tokens so far, `padding` moves
padding to the end of rows, `checkpointing` runs blocks again in backward. `upcycled` goes around
upcycled models of transformers. `folders` writes a folder from weights, with `tokenizer_folder` and
`model_card`. `expert_balance` is for training models with experts by transformers' `Trainer`.
"""

import importlib.util

from mhc_lightning.errors import UserError

if importlib.util.find_spec("transformers") is None:
    raise UserError(
        "mhc_lightning.huggingface needs transformers, which is not installed; install the extra"
        " `huggingface`: pip install 'mhc-lightning[huggingface]'"
    )

from transformers import AutoConfig, AutoModelForCausalLM

from mhc_lightning.huggingface.cache import MhcCache
from mhc_lightning.huggingface.causal_lm import MhcForCausalLM
from mhc_lightning.huggingface.config import MhcConfig
from mhc_lightning.huggingface.expert_balance import BalanceExperts

AutoConfig.register(MhcConfig.model_type, MhcConfig)
AutoModelForCausalLM.register(MhcConfig, MhcForCausalLM)

__all__ = ["BalanceExperts", "MhcCache", "MhcConfig", "MhcForCausalLM"]
