"""`start_as_residual`: every connection takes the place of an ordinary residual connection."""

import pytest
import torch
from networks import CONNECTIONS, scrambled

from mhc_lightning.errors import UserError
from mhc_lightning.kernels import expand_streams
from mhc_lightning.modules import Connection, GatedHyperConnection, SinglePassHyperConnection
from mhc_lightning.modules.initialisation import reset_module

GATED = [
    name
    for name, build in CONNECTIONS.items()
    if isinstance(build(dim=4, num_streams=2, layer_index=0), GatedHyperConnection)
]


@pytest.mark.parametrize(
    ("name", "n"),
    [(name, n) for name in CONNECTIONS for n in (2, 3, 4, 8) if (name, n) != ("mhc_lite", 8)],
)
def test_copies_stay_copies_and_are_read_whole(name: str, n: int) -> None:
    connection = scrambled(CONNECTIONS[name](dim=8, num_streams=n, layer_index=5))
    connection.start_as_residual()
    connection.double()  # the sums below are those of the float32 parameters
    n = connection.num_streams
    x = torch.randn(3, 8, dtype=torch.float64)
    streams = expand_streams(x, n)
    carry = torch.full((3, n), 1 / n).double() if name == "mhc_single_pass" else None
    read = []

    def sublayer(u):
        read.append(u)
        return 100 * u.tanh()  # no norm, which would hide a scale

    merged, carry = connection.run(streams, sublayer, carry).merge()
    torch.testing.assert_close(read[0], x, rtol=3e-7, atol=0)
    expected = expand_streams(x + 100 * x.tanh(), n)
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=0)
    if carry is not None:
        torch.testing.assert_close(carry.sum(-1), torch.ones(3).double(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("name", CONNECTIONS)
def test_the_mappings_do_not_depend_on_the_token(name: str) -> None:
    connection = scrambled(CONNECTIONS[name](dim=8, num_streams=2, layer_index=1))
    connection.start_as_residual()
    pre, post, residual = connection.mappings(torch.randn(2, connection.num_streams, 8))
    for mapping in (pre, post, residual):
        assert torch.equal(mapping[0], mapping[1])
    assert torch.equal(post, torch.ones_like(post))


@pytest.mark.parametrize("name", sorted(set(CONNECTIONS) - {"residual"}))
def test_sub_layers_prefer_different_streams(name: str) -> None:
    preferred = []
    for k in range(4):
        connection = CONNECTIONS[name](dim=8, num_streams=4, layer_index=k)
        connection.start_as_residual()
        pre = connection.mappings(torch.randn(4, 8)).pre
        assert pre.sort().values[-1] > 1.5 * pre.sort().values[-2]
        preferred.append(int(pre.argmax()))
    assert sorted(preferred) == [0, 1, 2, 3]


def test_the_single_pass_start_is_handed_on_as_the_carry() -> None:
    connection = SinglePassHyperConnection(dim=8, num_streams=4, layer_index=0)
    connection.start_as_residual()
    carry = connection.run(torch.randn(4, 8), torch.tanh).merge()[1]
    assert carry is not None
    assert int(carry.argmax()) == 1  # the next sub-layer's


@pytest.mark.parametrize("name", GATED)
def test_one_stream_is_refused_where_a_gate_stays_below_one(name: str) -> None:
    connection = CONNECTIONS[name](dim=8, num_streams=1, layer_index=0)
    with pytest.raises(UserError, match="at least 2 streams, or connection=residual"):
        connection.start_as_residual()


@pytest.mark.parametrize("name", ["residual", "hc", "hc_static"])
def test_one_stream_is_right_where_the_weight_is_free(name: str) -> None:
    connection = scrambled(CONNECTIONS[name](dim=8, num_streams=1, layer_index=3))
    connection.start_as_residual()
    x = torch.randn(3, 1, 8)
    assert torch.equal(connection(x, torch.tanh), x + x.tanh())


def test_a_class_without_the_method_names_it() -> None:
    class Foreign(Connection):
        pass

    with pytest.raises(UserError, match=r"Foreign does not implement start_as_residual\(\)"):
        Foreign(dim=8, num_streams=2, layer_index=0).start_as_residual()


def test_reset_is_what_it_was() -> None:
    connection = CONNECTIONS["mhc"](dim=8, num_streams=4, layer_index=1)
    connection.start_as_residual()
    reset_module(connection, "connection")
    pre = connection.mappings(torch.randn(4, 8)).pre
    torch.testing.assert_close(pre.logit(), torch.tensor([-1.0, 1.0, -1.0, -1.0]))
