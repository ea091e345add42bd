"""Gates: what is drawn, its gradient and frequencies, and what a gated network does in eval mode."""

import pytest
import torch

from pruning.gates import GateSchedule, LayerGates, decide, interpolate, likeliest
from pruning.surgery import keep_layers

GROUPS = [[2, 4], [1, 2]]


def make_gates(*logits, **settings):
    gates = LayerGates(GROUPS, 6)
    with torch.no_grad():
        for p, values in zip(gates, logits, strict=False):
            p.copy_(torch.tensor([values]))
    for name, value in settings.items():
        setattr(gates, name, value)
    return gates


def test_initial_state():
    gates = LayerGates(GROUPS, 6)
    assert {name: tuple(p.shape) for name, p in gates.named_parameters()} == {"0": (1, 6), "1": (1, 2)}
    assert all((p == 0.02).all() for p in gates)
    assert set(gates.state_dict()) == {"0", "1"}


def test_likeliest_by_enumeration():
    """The most probable choices of all, best first, and the decision before all."""
    torch.manual_seed(0)
    gates = make_gates(*(torch.randn(size).tolist() for size in (6, 2)), scaling=3.0)
    soft = [(p[0] * 3.0).softmax(-1) for p in gates]
    every = {}
    for first, a in zip(gates.get_buffer("candidates_0").tolist(), soft[0].tolist(), strict=True):
        for second, b in zip(gates.get_buffer("candidates_1").tolist(), soft[1].tolist(), strict=True):
            every[tuple(i for i, keep in enumerate(first + second) if keep)] = a * b
    expected = sorted(every, key=lambda kept: -every[kept])
    assert [tuple(kept) for kept in likeliest(gates, 5)] == expected[:5]
    assert len(likeliest(gates, 100)) == 12
    assert likeliest(gates, 1) == [decide(gates).kept]


SIZES = [((7, 14), 8), ((14, 28), 15), ((2, 4), 3), ((1, 2), 2), ((3, 4), 4), ((4, 4), 1), ((1, 1), 1)]


@pytest.mark.parametrize(("group", "candidates"), SIZES)
def test_contiguous_candidates(group, candidates):
    """What is left are the ways to drop M - N layers in a row, each once."""
    n, m = group
    gates = LayerGates([group, [1, 2]], m + 2, candidates="contiguous")
    table = gates.get_buffer("candidates_0")
    expected = {tuple(range(start, start + m - n)) for start in range(n + 1)} if n < m else {()}
    assert {tuple((row == 0).nonzero().flatten().tolist()) for row in table} == expected
    assert (len(table), tuple(gates[0].shape)) == (candidates, (1, candidates))
    assert (gates.draw(50)[:, :m].sum(1) == n).all()
    assert (gates.choose(50)[0][:, :m].sum(1) == n).all()


def test_too_many_candidates():
    """Only where all are asked for."""
    with pytest.raises(ValueError, match=r"group 14:28 has over 1,000,000 candidates: split it"):
        LayerGates([[14, 28]], 28)


@pytest.mark.parametrize(("tau", "scaling"), [(4.0, 100.0), (0.1, 100.0), (1.0, 1.0)])
def test_mask_is_one_candidate_per_group(tau, scaling):
    """Every value is exactly 0 or 1, and every group keeps as many layers as its pattern says."""
    torch.manual_seed(0)
    mask = make_gates(tau=tau, scaling=scaling).draw(500)
    assert mask.shape == (500, 6)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert (mask[:, :4].sum(1) == 2).all()
    assert (mask[:, 4:].sum(1) == 1).all()
    assert len(mask.unique(dim=0)) > 1  # samples draw for themselves


@pytest.mark.parametrize(("tau", "scaling"), [(1.0, 1.0), (2.5, 3.0)])
def test_gradient_is_that_of_the_softmax(tau, scaling):
    """d(mask)/d(logits) = scaling / tau * (diag(s) - s s^T) applied to the candidate table."""
    gates = make_gates([0.3, -0.2, 0.1, 0.5, 0.0, -0.4], [0.2, -0.1], tau=tau, scaling=scaling)
    torch.manual_seed(3)
    gumbel = gates.draw_gumbel(5)
    weight = torch.randn(5, 6)
    (gates.draw(5, gumbel) * weight).sum().backward()
    for g, layers in ((0, slice(0, 4)), (1, slice(4, 6))):
        soft = ((gates[g].detach() * scaling + gumbel[g]) / tau).softmax(-1)
        per_candidate = weight[:, layers] @ gates.get_buffer(f"candidates_{g}").T
        jacobian = torch.diag_embed(soft) - soft[:, :, None] * soft[:, None, :]
        expected = scaling / tau * torch.einsum("nij,nj->i", jacobian, per_candidate)
        torch.testing.assert_close(gates[g].grad[0], expected)


@pytest.mark.parametrize("tau", [0.1, 4.0])
def test_frequencies_follow_the_softmax(tau):
    """Candidates are drawn with probability softmax(scaling * logits), whatever the temperature."""
    logits = [1.0, 0.0, -1.0, 0.5, 0.2, -0.3]
    gates = make_gates(logits, [0.6, 0.0], tau=tau, scaling=2.0)
    torch.manual_seed(0)
    n = 20000
    mask = gates.draw(n).detach()
    for g, layers in ((0, slice(0, 4)), (1, slice(4, 6))):
        table = gates.get_buffer(f"candidates_{g}")
        drawn = (mask[:, None, layers] == table).all(-1).float().mean(0)
        torch.testing.assert_close(drawn, (gates[g][0].detach() * 2).softmax(-1), atol=0.015, rtol=0)


def test_decision_and_confidence():
    gates = make_gates([0.0, 0.3, 0.0, 0.0, 0.0, 0.3], [0.0, 0.2], scaling=10.0)
    kept, confidence = decide(gates)
    assert kept == [0, 2, 5]  # of two equal candidates the first
    expected = [torch.tensor(v).mul(10).softmax(0).max().item() for v in ([0, 0.3, 0, 0, 0, 0.3], [0, 0.2])]
    assert confidence == pytest.approx(expected)


@pytest.mark.parametrize(
    ("step", "total", "value"), [(0, 11, 4.0), (10, 11, 0.0), (5, 11, 2.0), (99, 11, 0.0), (0, 1, 4.0)]
)
def test_schedule(step, total, value):
    assert interpolate((4.0, 0.0), step, total) == pytest.approx(value)


def test_schedule_of_both():
    """One schedule sets temperature and scaling of several gates, which share nothing else."""
    gates = [make_gates(), make_gates()]
    GateSchedule((4.0, 0.0), (100.0, 300.0), 11).apply(5, *gates)
    assert [(each.tau, each.scaling) for each in gates] == [(pytest.approx(2.0), pytest.approx(200.0))] * 2


def test_eval_mode_equals_the_cut_network(small_net, batch):
    """A gated network in eval mode is deterministic and computes what the cut network computes, bit for bit."""
    gated = small_net(6, GROUPS)
    with torch.no_grad():
        gated.gumbel_gates[0].copy_(torch.randn(1, 6, generator=torch.Generator().manual_seed(2)))
        gated.gumbel_gates[1].copy_(torch.tensor([[0.0, 1.0]]))
    kept = decide(gated).kept
    cut = small_net(3)
    cut.load_state_dict(keep_layers(gated.state_dict(), kept))
    assert torch.equal(gated(*batch), gated(*batch))
    assert torch.equal(gated(*batch), cut(*batch))


def test_training_mode_draws_per_sample(small_net, batch):
    """Each sample runs the layers drawn for it: the same as running the cut network on that sample alone."""
    net = small_net(6, GROUPS)
    torch.manual_seed(0)
    mask = net.gumbel_gates.draw(4).detach()
    out = net(*batch, mask=mask)
    for i in range(4):
        kept = mask[i].nonzero().flatten().tolist()
        cut = small_net(3)
        cut.load_state_dict(keep_layers(net.state_dict(), kept))
        torch.testing.assert_close(out[i : i + 1], cut(*(tensor[i : i + 1] for tensor in batch)))
    net.train()
    assert not torch.equal(net(*batch), net(*batch))


@pytest.mark.parametrize("groups", [[[2, 4]], [[2, 4], [1, 4]], []])
def test_groups_must_cover_the_depth(small_net, groups):
    with pytest.raises(ValueError, match=r"but there are 6|covers 0 layers"):
        small_net(6, groups)


def test_scores_of_layers():
    """The logit of a candidate is the sum of the scores of its layers; draws and decision follow it."""
    groups = [[2, 4], [1, 2]]
    torch.manual_seed(0)
    scored, plain = LayerGates(groups, 6, "layers"), LayerGates(groups, 6)
    assert [tuple(p.shape) for p in scored] == [(1, 4), (1, 2)]
    with torch.no_grad():
        for g in range(2):
            scored[g].copy_(torch.randn(scored[g].shape))
            table = scored.get_buffer(f"candidates_{g}")
            plain[g].copy_((table * scored[g]).sum(1))
    assert decide(scored).kept == decide(plain).kept
    assert decide(scored).confidence == pytest.approx(decide(plain).confidence, rel=1e-5)
    assert likeliest(scored, 5) == likeliest(plain, 5)
    for gates in (scored, plain):
        gates.tau, gates.scaling = 2.0, 1.0
    noise = plain.draw_gumbel(50)
    masks = [gates.draw(50, noise) for gates in (scored, plain)]
    torch.testing.assert_close(*masks)
    weights = torch.randn(6)
    for mask in masks:
        (mask @ weights).sum().backward()
    for g in range(2):  # the chain rule, through the sum
        table = scored.get_buffer(f"candidates_{g}")
        torch.testing.assert_close(scored[g].grad, plain[g].grad @ table, rtol=1e-4, atol=1e-4)
    drawn, _ = scored.choose(8)
    assert torch.equal(drawn.sum(1), torch.full((8,), 3.0))
