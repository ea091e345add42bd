"""Criteria that rank layers and searches over choices, against networks that were really cut."""

from itertools import combinations
from types import SimpleNamespace

import pytest
import torch

import prune_by_score
from diffusion.flow import FlowObjective
from families import FAMILIES, create_model, depth_name, stack_layers
from pruning.scores import (
    CRITERIA,
    BlockChange,
    BlockInfluence,
    least_important,
    measure_change,
    measure_influence,
    measure_losses,
    measure_magnitude,
    measure_output_change,
    measure_sensitivity,
)
from pruning.search import MAX_CHOICES, all_choices, choice_masks, count_choices, draw_choices, find_loss
from pruning.surgery import keep_layers

NAMES = {"DiT": "DiT-T-D4/2", "SiT": "SiT-T-D4/2", "MAR": "MAR-T-D2+2"}
SHAPE = {"input_size": 8, "in_channels": 3, "num_classes": 5}


@pytest.fixture(params=NAMES)
def measured(request):
    """A network of four layers with random weights, its objective and two batches; `cut` gives a network of some."""
    name, family = NAMES[request.param], FAMILIES[request.param]
    generator = torch.Generator().manual_seed(0)
    net = create_model(name, **SHAPE).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    batches = [
        (torch.randn(6, 3, 8, 8, generator=generator), torch.randint(5, (6,), generator=generator)) for _ in range(2)
    ]

    def cut(kept):
        border = stack_layers(name)[0]
        depths = [sum(layer < border for layer in kept), sum(layer >= border for layer in kept)]
        shallow = create_model(depth_name(name, depths[: len(stack_layers(name))]), **SHAPE).eval()
        shallow.load_state_dict(keep_layers(net.state_dict(), kept))
        return shallow

    objective = family.make_objective(**family.own_defaults("train"))
    return SimpleNamespace(net=net, objective=objective, batches=batches, cut=cut, stacks=stack_layers(name))


def outputs(measured, net):
    """[(output, draw, x)] of a network on the batches, with draws that depend on the seed alone."""
    torch.manual_seed(1)
    found = []
    with torch.no_grad():
        for x, y in measured.batches:
            draw = measured.objective.draw(measured.net, x, y)
            found.append((measured.objective.predict(net, x, y, draw), draw, x))
    return found


def loss_of(measured, net):
    """Mean loss of a network on the batches, one draw each."""
    losses = [measured.objective.loss(out, x, draw)["loss"] for out, draw, x in outputs(measured, net)]
    return torch.cat(losses).double().mean().item()


def by_seed(measure, measured):
    torch.manual_seed(1)
    return measure(measured.net, measured.objective, measured.batches)


def without(layer):
    return [other for other in range(4) if other != layer]


def test_block_influence(measured):
    """The number of before, to the bit: cosine similarity over tokens, samples and batches."""
    torch.manual_seed(1)
    sums = torch.zeros(4, dtype=torch.float64)

    def observe(layer, before, after):
        sums[layer] += torch.nn.functional.cosine_similarity(before, after, dim=-1).mean().item()

    for x, y in measured.batches:
        draw = measured.objective.draw(measured.net, x, y)
        measured.objective.predict(measured.net, x, y, draw, observe=observe)
    assert torch.equal(by_seed(measure_influence, measured), sums / 2)


def test_flux_lite(measured):
    """Mean squared difference of what goes in and what comes out."""
    seen = [[] for _ in range(4)]
    torch.manual_seed(1)
    for x, y in measured.batches:
        draw = measured.objective.draw(measured.net, x, y)
        observe = lambda layer, a, b: seen[layer].append((a - b).square().mean().item())  # noqa: E731
        measured.objective.predict(measured.net, x, y, draw, observe=observe)
    expected = [sum(values) / 2 for values in seen]
    assert by_seed(measure_change, measured).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", [BlockInfluence, BlockChange])
def test_select(kind):
    """A criterion may look at one of two streams of tokens."""
    before, after = (torch.randn(2, 5, 8), torch.randn(2, 3, 8)), (torch.randn(2, 5, 8), torch.randn(2, 3, 8))
    second, plain = kind(1, select=lambda a, b: (a[1], b[1])), kind(1)
    second(0, before, after)
    plain(0, before[1], after[1])
    assert torch.equal(second.scores(), plain.scores())


def test_sensitivity(measured):
    """The loss of networks that were really cut, on the same draws."""
    whole = loss_of(measured, measured.net)
    expected = [loss_of(measured, measured.cut(without(layer))) - whole for layer in range(4)]
    assert by_seed(measure_sensitivity, measured).tolist() == pytest.approx(expected, abs=1e-6 * whole)
    assert max(expected) > 1e-4 * whole


def test_output_change(measured):
    """Squared differences of outputs, weighted by the share of noise."""
    expected, whole = [], outputs(measured, measured.net)
    for layer in range(4):
        sums = total = 0.0
        for (a, draw, _), (b, _, _) in zip(whole, outputs(measured, measured.cut(without(layer))), strict=True):
            share = measured.objective.noise_share(draw).double()
            assert share.shape == (len(a),)
            sums += (share * (a - b).square().flatten(1).mean(1)).sum().item()
            total += share.sum().item()
        expected.append(sums / total)
    assert by_seed(measure_output_change, measured).tolist() == pytest.approx(expected, rel=1e-4)
    assert min(expected) > 0


def test_noise_share(measured):
    """From 0 to 1, and more where there is more noise."""
    draw = measured.objective.draw(measured.net, *measured.batches[0])
    share = measured.objective.noise_share(draw)
    assert ((share >= 0) & (share <= 1)).all()
    falls = isinstance(measured.objective, FlowObjective)  # whose time runs from noise to data
    assert (share[draw.t.flatten().argsort(descending=falls)].diff() >= 0).all()


def test_magnitude(measured):
    """Mean absolute value of matrices alone; random scores are those of the seed. Neither reads data."""
    blocks = [block for block in measured.net.modules() if hasattr(block, "attn")]
    expected = [torch.cat([p.flatten() for p in b.parameters() if p.ndim > 1]).abs().mean().item() for b in blocks]
    assert measure_magnitude(measured.net).tolist() == pytest.approx(expected, rel=1e-5)
    numbers = [by_seed(CRITERIA["random"].measure, measured) for _ in range(2)]
    assert torch.equal(*numbers)
    assert len(set(numbers[0].tolist())) == 4
    assert [name for name, each in CRITERIA.items() if not each.reads_data] == ["magnitude", "random"]


def test_every_criterion(measured):
    """Scores (L,) in double precision; the script lists the same names."""
    assert tuple(CRITERIA) == prune_by_score.CRITERIA
    for criterion in CRITERIA.values():
        scores = by_seed(criterion.measure, measured)
        assert (scores.shape, scores.dtype) == ((4,), torch.float64)
        assert scores.isfinite().all()
        assert len(criterion.removed(scores, [[2, 4]])) == 2


@pytest.mark.parametrize("groups", [[[2, 4]], [[1, 2], [1, 2]]])
def test_search(measured, groups):
    """Losses of all choices are those of networks that were really cut; the network with all layers is one of them."""
    choices = draw_choices(groups, measured.stacks, "all")
    masks = choice_masks([range(4), *choices], 4)
    torch.manual_seed(1)
    told = []
    losses = measure_losses(measured.net, measured.objective, measured.batches, masks, lambda: told.append(1))
    expected = [loss_of(measured, measured.cut(list(kept))) for kept in choices]
    assert losses[0].item() == pytest.approx(loss_of(measured, measured.net), rel=1e-6)
    assert losses[1:].tolist() == pytest.approx(expected, rel=1e-6)
    assert len(told) == 2 * len(masks)
    order = sorted(range(len(choices)), key=expected.__getitem__)
    found = [find_loss(losses[1:], which) for which in ("lowest", "median", "highest")]
    assert [expected[i] for i in found] == pytest.approx(
        [expected[order[0]], expected[order[(len(order) - 1) // 2]], expected[order[-1]]], rel=1e-6
    )


@pytest.mark.parametrize(
    ("groups", "keeps_last", "removed"),
    [
        ([[4, 6]], False, [1, 5]),
        ([[4, 6]], True, [1, 3]),
        ([[1, 2]] * 3, False, [1, 3, 5]),
        ([[1, 2]] * 3, True, [1, 3, 4]),
        ([[2, 4], [1, 2]], False, [1, 3, 5]),
        ([[3, 3], [1, 3]], True, [3, 4]),
        ([[6, 6]], False, []),
    ],
)
def test_least_important(groups, keeps_last, removed):
    """The best N of every group stay; of equals the earlier goes."""
    importance = torch.tensor([0.5, 0.1, 0.5, 0.2, 0.3, 0.0])
    assert least_important(importance, groups, keeps_last) == removed
    assert least_important(torch.ones(6), [[1, 3]] * 2) == [0, 1, 3, 4]


@pytest.mark.parametrize(
    ("groups", "stacks", "number"),
    [
        ([[2, 4]], (4,), 6),
        ([[1, 2]] * 3, (6,), 8),
        ([[2, 4]], (2, 2), 4),
        ([[1, 4]], (2, 2), 0),
        ([[1, 2], [2, 3]], (2, 3), 6),
        ([[3, 6]], (1, 5), 10),
        ([[3, 6]], (1, 2, 3), 6),
    ],
)
def test_choices(groups, stacks, number):
    """As many as are counted, each once, with layers in every stack."""
    choices = list(all_choices(groups, stacks))
    assert len(set(choices)) == len(choices) == count_choices(groups, stacks) == number
    assert all(list(kept) == sorted(kept) for kept in choices)
    if number:
        assert draw_choices(groups, stacks, "all") == draw_choices(groups, stacks, 10**6) == choices
        few = draw_choices(groups, stacks, 3, seed=5)
        assert len(set(few)) == 3
        assert set(few) <= set(choices)
        assert few == draw_choices(groups, stacks, 3, seed=5)


def test_random_choices_of_many():
    """Without listing all: different ones, of the seed, each layer about equally often; free or by groups."""
    for groups in ([[14, 28]], [[2, 4]] * 7):
        drawn = draw_choices(groups, (28,), 2000, seed=1)
        assert len(set(drawn)) == 2000
        assert drawn == draw_choices(groups, (28,), 2000, seed=1)
        assert drawn != draw_choices(groups, (28,), 2000, seed=2)
        shares = choice_masks(drawn, 28).mean(0)
        assert ((shares - 0.5).abs() < 0.06).all()
    uneven = draw_choices([[3, 100]], (1, 99), 500)
    assert all(kept[0] == 0 and len(kept) == 3 for kept in uneven)
    assert len(set(uneven)) == 500


@pytest.mark.parametrize(
    ("groups", "stacks", "how_many", "message"),
    [
        ([[14, 28]], (28,), "all", "at most 100,000"),
        ([[14, 28]], (28,), MAX_CHOICES + 1, "at most 100,000"),
        ([[1, 2]] * 400, (800,), "all", "at most 100,000"),
        ([[1, 4]], (2, 2), 5, r"stacks of \(2, 2\) layers empty"),
    ],
)
def test_choices_that_cannot_be(groups, stacks, how_many, message):
    with pytest.raises(ValueError, match=message):
        draw_choices(groups, stacks, how_many)


def test_median_is_one_of_them():
    losses = torch.tensor([3.0, 1.0, 2.0, 1.0])
    assert [find_loss(losses, which) for which in ("lowest", "median", "highest")] == [1, 3, 0]
    assert find_loss(torch.tensor([1.0, 2.0, 2.0]), "highest") == 1
    assert list(combinations(range(3), 2)) == list(all_choices([[2, 3]], (3,)))


@pytest.mark.parametrize(
    ("groups", "stacks", "fixed"),
    [([[1, 2]] * 3, [6], [5]), ([[3, 6]], [6], [5]), ([[2, 4], [1, 2]], [4, 2], [3]), ([[3, 6]], [2, 4], [1])],
)
def test_choices_keep_fixed_layers(groups, stacks, fixed):
    """By enumeration: those of all choices that have these layers, counted, listed and drawn."""
    expected = [kept for kept in all_choices(groups, stacks) if set(fixed) <= set(kept)]
    assert count_choices(groups, stacks, fixed) == len(expected) < count_choices(groups, stacks)
    assert draw_choices(groups, stacks, "all", fixed=fixed) == expected
    assert set(draw_choices(groups, stacks, 2, seed=3, fixed=fixed)) <= set(expected)


def test_fixed_layers_are_not_removed():
    importance = torch.tensor([3.0, 2.0, 5.0, 0.0])
    assert least_important(importance, [[2, 4]]) == [1, 3]
    assert least_important(importance, [[2, 4]], fixed=[3]) == [0, 1]
    assert least_important(importance, [[1, 2], [1, 2]], keeps_last=True, fixed=[1]) == [0, 2]


def test_streams_are_joined():
    """Every token counts as much, whichever stream it belongs to."""
    torch.manual_seed(0)
    before = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    after = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    observer = BlockInfluence(1)
    observer(0, before, after)
    parts = [torch.nn.functional.cosine_similarity(a, b, dim=-1).mean() for a, b in zip(before, after, strict=True)]
    assert observer.scores()[0].item() == pytest.approx((3 * parts[0] + 5 * parts[1]).item() / 8, abs=1e-6)
    single = BlockInfluence(1)
    single(0, before[0], after[0])
    assert single.scores()[0].item() == pytest.approx(parts[0].item(), abs=1e-7)
