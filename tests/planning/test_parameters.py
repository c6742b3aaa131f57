"""Parameter counts, against those of real modules."""

from mhc_lightning.planning.parameters import count_parameters


def test_active_parameters_leave_out_the_embedding_and_idle_experts(build):
    sizes = {"num_experts": 8, "num_active_experts": 2, "num_shared_experts": 1}
    model = build("hc", **sizes)
    counts = count_parameters(model)
    vocabulary = 100 * 32
    one_expert = 3 * 32 * 40
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.active == counts.total - vocabulary - 6 * one_expert
    assert counts.vocabulary == 2 * vocabulary
    # Per sub-layer: C(n + 2) + n² + 2n + 2.
    assert counts.connections == 4 * (32 * 6 + 24 + 2)


def test_a_residual_network_has_no_connection_parameters(build):
    counts = count_parameters(build("residual"))
    assert counts.connections == 0
    assert counts.active == counts.total - 100 * 32
