"""The classes that an n-gram of each position consists of."""

import numpy as np
import torch

from mhc_lightning.modules.memory.hashing import NgramHash
from mhc_lightning.modules.memory.layout import prime_layout


def test_classes_of_earlier_positions_and_the_pad_before_the_first():
    ngrams = NgramHash(prime_layout([0], [2, 3], 2, 50), 6)
    ngrams.bind(np.array([0, 1, 1, 2, 3]), pad_token=4, document_end=4)
    pad = 3  # the class of token 4
    tokens = torch.tensor([[0, 2, 4, 3, 1]])
    now, before, second = ngrams.look_back(tokens)
    assert now.tolist() == [[0, 1, pad, 2, 1]]
    assert before.tolist() == [[pad, 0, 1, pad, 2]]  # token 3 begins a document
    assert second.tolist() == [[pad, pad, 0, pad, pad]]
    _, before, second = ngrams.look_back(tokens[:, :2], torch.tensor([[3, 2]]))
    assert before.tolist() == [[1, 0]]
    assert second.tolist() == [[2, 1]]
