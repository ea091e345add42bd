"""The head's steps on memory that stays: the samples of the plain loop, whatever was in it; on a GPU as graphs too."""

import copy

import pytest
import torch

from diffusion import head_graph
from diffusion.head_graph import LARGEST, HeadGraphs, padded_rows
from diffusion.masked import plan_steps
from families import create_model, family_of

CLASSES, SHAPE = 10, (16, 6, 6)

pytestmark = pytest.mark.own_device


@pytest.fixture(scope="module")
def net():
    config = {"input_size": SHAPE[1], "in_channels": SHAPE[0], "patch_size": 1, "num_classes": CLASSES}
    net = create_model("MAR-T", **config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return net


def make_sampler(steps=6, cfg_scale=3.0, **options):
    flags = {"num_iter": 5, "cfg_schedule": "linear", "temperature": 0.9, "clip_denoised": True, "head_graphs": True}
    return family_of("MAR-T").make_sampler(steps, cfg_scale, **flags | options)


class Plain(HeadGraphs):
    """Steps are taken by the function that a graph is recorded of, on any device."""

    recorded = 0

    def __init__(self, diffusion):
        super().__init__(diffusion, self.keep)

    def keep(self, step, buffers):
        self.recorded += 1
        return step

    def fit(self, start):
        return True


def draw(sampler, net, n=3, seed=0):
    device = net.class_emb.weight.device
    generator = torch.Generator().manual_seed(seed)

    def noise_of(_, shape, count):
        return torch.randn(count, n, *shape, generator=generator).to(net.class_emb.weight)

    labels = torch.arange(n, device=device)
    return sampler(net, labels, noise_of(0, SHAPE, 1)[0], noise_of)


def check_same(found, expected, tolerance):
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_rows_are_rounded_up():
    counts = range(1, LARGEST + 1)
    rows = [padded_rows(count) for count in counts]
    assert all(count <= padded < max(17, 1.25 * count + 16) for count, padded in zip(counts, rows, strict=True))
    assert sorted(set(rows)) == sorted({padded_rows(padded) for padded in rows})
    assert len(set(rows)) <= 30
    assert (padded_rows(1), padded_rows(192), padded_rows(193), padded_rows(LARGEST)) == (16, 192, 224, LARGEST)


@pytest.mark.parametrize("schedule", ["linear", "constant"])
@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 6])
def test_plain_steps_give_the_samples_of_the_loop(net, steps, cfg_scale, schedule):
    """Again with the same memory, of which the padding holds what was there before; scales change in between.

    In float64: with more rows products are rounded otherwise, which this chain counts 20,000-fold.
    """
    net = copy.deepcopy(net).double()
    sampler, graphs = (make_sampler(steps, cfg_scale, cfg_schedule=schedule) for _ in range(2))
    graphs.graphs = Plain(graphs.diffusion)
    for seed, n in ((0, 3), (1, 2), (2, 3)):
        check_same(draw(graphs, net, n, seed), draw(sampler, net, n, seed), 1e-9)
    assert 1 <= graphs.graphs.recorded < 3 * sampler.num_iter


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_precision_and_modes(net, monkeypatch, cfg_scale):
    """Without padding to the bit, under autocast too; memory made in inference mode is of use outside, and the reverse.

    Some scales are no numbers of half precision: rounding them would show.
    """
    monkeypatch.setattr(head_graph, "padded_rows", lambda count: count)
    sampler, graphs = make_sampler(cfg_scale=cfg_scale), make_sampler(cfg_scale=cfg_scale)
    graphs.graphs = Plain(graphs.diffusion)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(draw(graphs, net), draw(sampler, net))
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(draw(graphs, net), draw(sampler, net))
    counts = {before - after for before, after, _ in plan_steps(SHAPE[1] ** 2, sampler.num_iter)}
    assert graphs.graphs.recorded == 2 * len(counts)


def test_graphs_of_another_head_are_dropped(net):
    net, other = copy.deepcopy(net).double(), copy.deepcopy(net).double()
    other.diffloss.net.final_layer.linear.weight *= -1
    sampler = make_sampler()
    sampler.graphs = Plain(sampler.diffusion)
    draw(sampler, net)
    check_same(draw(sampler, other), draw(make_sampler(), other), 1e-9)
    check_same(draw(sampler, net), draw(make_sampler(), net), 1e-9)


def test_the_cpu_takes_the_loop(net):
    sampler = make_sampler()
    draw(sampler, net)
    assert not sampler.graphs.kept
    assert make_sampler(head_graphs=False).graphs is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("steps", [2, 6])
def test_recorded_graphs(net, monkeypatch, steps, precision, cfg_scale):
    """On a GPU: graphs give the samples of the loop up to rounding, again and again; in half precision unpadded."""
    if precision:
        monkeypatch.setattr(head_graph, "padded_rows", lambda count: count)
    on_gpu = copy.deepcopy(net).to("cuda", torch.float64 if precision is None else None)
    graphs, loop = (make_sampler(steps, cfg_scale, head_graphs=flag).to("cuda") for flag in (True, False))
    with torch.inference_mode(), torch.autocast("cuda", precision, enabled=precision is not None):
        for seed, n in ((0, 3), (1, 2), (2, 3)):
            found, expected = draw(graphs, on_gpu, n, seed), draw(loop, on_gpu, n, seed)
            check_same(found, expected, 1e-9 if precision is None else 0.1)
        assert graphs.graphs.kept
