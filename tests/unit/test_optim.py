"""The averaged copy of the weights: how it follows them, and how much of its start is left."""

import pytest
import torch
from torch import nn

from engine.optim import Ema, Recipe, decay_at, decay_groups, share_of_start


@pytest.mark.parametrize("decay", [0.9999, 0.5, 0.05, 0.0])
def test_decay_with_warmup(decay):
    """It rises from a tenth and stays at `decay`, never above."""
    found = [decay_at(step, decay, True) for step in range(200_000)]
    assert found[0] == min(0.1, decay)
    assert found == sorted(found)
    assert max(found) == found[-1] == decay


def test_decay_without_warmup():
    assert {decay_at(step, 0.9999, False) for step in range(1000)} == {0.9999}


def follow(steps, decay, *warmup):
    """The average of a weight that was 1 at first and 0 ever since: what is left of the start."""
    net = nn.Linear(1, 1).double()
    net.weight.data.fill_(1.0)
    ema = Ema(net, decay, *warmup)
    net.weight.data.zero_()
    for step in range(steps):
        ema.update(step)
    return ema.module.weight.item()


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize(("steps", "decay"), [(0, 0.9), (1, 0.9999), (3, 0.5), (300, 0.99)])
def test_share_of_start(steps, decay, warmup):
    assert share_of_start(steps, decay, warmup) == pytest.approx(follow(steps, decay, warmup))


def test_share_after_a_short_run():
    """With the usual decay a third of the start is left after 10,000 steps; with warm-up nothing that counts."""
    assert share_of_start(10_000, 0.9999) == pytest.approx(0.368, abs=1e-3)
    assert share_of_start(10_000, 0.9999, True) < 1e-3
    assert share_of_start(1, 0.9999, True) == 0.1


def test_warmup_is_off_by_default():
    """Without a word about it the decay is the same from the first step on."""
    assert follow(1, 0.9999) == pytest.approx(0.9999)
    assert share_of_start(1, 0.9999) == 0.9999


def test_average_of_trained_parameters():
    """What is not trained stays as it is, and the average is no part of training."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)).double()
    start, ema = [p.detach().clone() for p in net.parameters()], Ema(net, 0.75)
    with torch.no_grad():
        for p in net.parameters():
            p += 1
    ema.update(0)
    found = list(ema.module.parameters())
    assert not any(p.requires_grad for p in found)
    for i, (got, old) in enumerate(zip(found, start, strict=True)):
        torch.testing.assert_close(got, old + 0.25 if i < 2 else old)


def test_recipe():
    """Warm-up in epochs, a cosine from `lr` to `min_lr`, and decay of matrices alone."""
    net = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    recipe = Recipe(epochs=10, lr=1.0, min_lr=0.2, weight_decay=0.1, betas=[0.9, 0.95], warmup_epochs=2)
    rate = recipe.schedule(50)
    assert [rate(step) for step in (0, 5, 10, 30, 50, 60)] == pytest.approx([0, 0.5, 1, 0.6, 0.2, 0.2])
    matrices, others = recipe.groups(net)
    assert [p.shape for p in matrices["params"]] == [(2, 3)]
    assert len(others["params"]) == 3
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert matrices["betas"] == others["betas"] == (0.9, 0.95)
    assert [group["weight_decay"] for group in decay_groups(net, 0.1, exempt=["0."])] == [0.0]
    assert [len(group["params"]) for group in decay_groups(net, 0.0)] == [4]
