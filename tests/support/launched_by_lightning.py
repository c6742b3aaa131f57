"""Trains and tests in two processes that Lightning forks or spawns; prints JSON."""

import json
import sys
import warnings

import torch
from lightning_features import fit, text_data, text_model, trainer


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    module, data = text_model(), text_data()
    pair = {"strategy": sys.argv[1], "devices": 2, "logger": False}
    fit(module, data, **pair)
    (found,) = trainer(**pair).test(module, datamodule=data, verbose=False)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
