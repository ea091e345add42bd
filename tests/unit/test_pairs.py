"""Gates from pairs: their expected gradient is that of the expected loss, for every family and target."""

import itertools

import pytest
import torch
from torch import nn

from diffusion.objectives import TrainStep
from families import create_model, family_of
from pruning.distillation import DistillStep
from pruning.gates import LayerGates
from pruning.pairs import PairStep

SHARES = (0.0, 0.5, 1.0)
NAMES = ["DiT-T-1-2", "SiT-T-1-2", "MAR-T-1-2"]
CHOICES = list(itertools.product(range(2), repeat=2))  # of two groups of two


def make_networks(name, groups):
    """A gated network whose layers matter, the objective of its family, and a teacher."""
    torch.manual_seed(0)
    config = {"input_size": 8, "in_channels": 3, "num_classes": 5, "groups": groups}
    family = family_of(name)
    config |= family.with_stacks([2, 2] if name.startswith("MAR") else [4])
    net, teacher = (create_model(name, **config).double().train() for _ in range(2))
    for p in itertools.chain(net.parameters(), teacher.parameters()):
        nn.init.normal_(p, std=0.1)
    return net, family.make_objective(**family.own_defaults("train")), teacher


def batch():
    torch.manual_seed(5)
    return torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 2, 4])


def choose_always(gates, candidates):
    """What `choose` gives if all samples happen to choose these candidates."""
    masks = [gates.get_buffer(f"candidates_{g}")[k].expand(3, -1) for g, k in enumerate(candidates)]
    logs = [(p[0] * gates.scaling).log_softmax(-1)[k].expand(3) for p, k in zip(gates, candidates, strict=True)]
    return torch.cat(masks, 1), sum(logs)


def run_pair(step, gates, *pair):
    """The terms of one step in which all samples choose these two."""
    outcomes = iter(pair)
    gates.choose = lambda n: choose_always(gates, next(outcomes))
    torch.manual_seed(7)
    terms = step(*batch())
    del gates.choose
    return terms


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", NAMES)
def test_expected_gradient_is_that_of_the_expected_loss(name, share):
    """By enumeration: over all pairs of choices, weighted by how likely they are, in float64."""
    net, objective, teacher = make_networks(name, [[1, 2], [1, 2]])
    gates, step = net.gumbel_gates, PairStep(net, objective, share, teacher if share else None)
    gates.scaling = 3.0
    with torch.no_grad():
        gates[0].copy_(torch.tensor([[0.3, -0.1]]))
        gates[1].copy_(torch.tensor([[-0.2, 0.2]]))
    likely = {c: choose_always(gates, c)[1][0].exp() for c in CHOICES}
    losses = {c: run_pair(step, gates, c, c)["loss"].mean().detach() for c in CHOICES}
    exact = torch.autograd.grad(sum(likely[c] * losses[c] for c in CHOICES), list(gates))

    expected = [torch.zeros_like(p) for p in gates]
    for pair in itertools.product(CHOICES, repeat=2):
        found = torch.autograd.grad(run_pair(step, gates, *pair)["loss"].mean(), list(gates))
        weight = likely[pair[0]] * likely[pair[1]]
        for total, gradient in zip(expected, found, strict=True):
            total += (weight * gradient).detach()
    assert all(value.abs().max() > 1e-6 for value in exact)
    for value, total in zip(exact, expected, strict=True):
        torch.testing.assert_close(total, value, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", NAMES)
def test_terms_are_means_of_what_plain_steps_give(name, share):
    net, objective, teacher = make_networks(name, [[1, 2], [1, 2]])
    step = PairStep(net, objective, share, teacher if share else None)
    plain = DistillStep(net, teacher, objective, (), share, beta=0.0) if share else TrainStep(net, objective)
    found, expected = run_pair(step, net.gumbel_gates, (0, 1), (1, 1)), []
    for candidates in ((0, 1), (1, 1)):
        mask, _ = choose_always(net.gumbel_gates, candidates)
        net.gumbel_gates.draw = lambda n, mask=mask: mask
        torch.manual_seed(7)
        expected.append(plain(*batch()))
    for term in ("loss", "kd_loss", "gt") if share else ("loss", "mse" if "mse" in found else "loss"):
        torch.testing.assert_close(found[term], (expected[0][term] + expected[1][term]) / 2)


def test_choices_are_as_likely_as_the_logits_say():
    gates = LayerGates([[2, 4], [1, 2]], 6)
    gates.scaling = 2.0
    with torch.no_grad():
        gates[1].copy_(torch.tensor([[0.4, -0.1]]))
    torch.manual_seed(0)
    mask, log_probability = gates.choose(20_000)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert (mask[:, :4].sum(1) == 2).all()
    share = torch.sigmoid(torch.tensor(2 * 0.5)).item()  # of the fifth layer against the sixth
    assert mask[:, 4].mean().item() == pytest.approx(share, abs=0.015)
    assert log_probability.exp().unique().tolist() == pytest.approx([(1 - share) / 6, share / 6])
    assert not mask.requires_grad
    assert log_probability.requires_grad
