"""The replay of a norm in autograd's thread."""

import threading

import torch
from torch import nn
from torch.nn.functional import linear

from mhc_lightning.modules.replay import NormReplay


def test_a_norm_replayed_by_autograds_thread_leaves_copies_of_weights_to_those_who_share_them():
    weight, x, norm = nn.Parameter(torch.randn(8, 8)), torch.randn(2, 8), nn.RMSNorm(8)
    replay = NormReplay(norm.forward, True, torch.bfloat16)

    def copy_of_weight():
        kept = []

        def keep(tensor):
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            linear(x.clone().requires_grad_(), weight)
        return next(t for t in kept if t.shape == (8, 8)).untyped_storage().data_ptr()

    with torch.autocast("cpu", torch.bfloat16):
        before = copy_of_weight()
        thread = threading.Thread(target=replay.__call__, args=(x,))
        thread.start()
        thread.join()
        assert copy_of_weight() == before
        assert torch.is_autocast_enabled("cpu")
        plain = NormReplay(norm.forward, True, None)
        assert plain(x)[0].dtype == torch.float32
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
