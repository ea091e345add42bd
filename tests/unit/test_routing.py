"""Skipped samples without a backward: the gradients of the dense form, for every update and with every option."""

import pytest
import torch
from machine import DEVICE
from torch import nn

from diffusion.objectives import TrainStep
from families import create_model, family_of
from models import DiT
from pruning.gates import BlockStack, LayerGates, block_stacks
from pruning.lora import weight_update
from pruning.patterns import parse_pattern

UPDATES = {"full": (True, None), "lora": (True, 4), "gates": (False, None)}
DEPTHS = {"1:2": 6, "2:4": 8, "7:14": 14, "2:4,1:2,3:5": 11}


def gated_net(pattern, update="full", dtype=torch.float64):
    """A small gated network with weights that matter everywhere, ready to be trained by `update`."""
    depth = DEPTHS[pattern]
    torch.manual_seed(0)
    net = DiT(4, 2, 2, 16, depth, 2, num_classes=5, groups=parse_pattern(pattern, depth)).to(DEVICE)
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    weight_update(net, *UPDATES[update])
    for name, p in net.named_parameters():
        if "lora_b" in name:
            nn.init.normal_(p, std=0.2)
    return net.to(dtype).train()


def gradients(net, dense, mask=None, n=6, **settings):
    """Output and all gradients of one pass with the same draws."""
    for stack in block_stacks(net):
        stack.dense = dense
        for name, value in settings.items():
            setattr(stack, name, value)
    torch.manual_seed(1)
    x, goal = torch.randn(2, n, 2, 4, 4).to(net.pos_embed.dtype)
    net.zero_grad(set_to_none=True)
    out = net(x, torch.arange(n) * 100, torch.arange(n) % 5, mask=mask)
    (out[:, :2] - goal).square().sum().backward()
    return out.detach(), {name: p.grad for name, p in net.named_parameters() if p.requires_grad}


def assert_equal(got, expected, limit=1e-10):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().item()
        assert (got[name] - value).abs().max().item() <= limit * scale, name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("pattern", DEPTHS)
def test_gradients_equal_the_dense_form(pattern, update, checkpointing):
    net = gated_net(pattern, update)
    (out, expected), (sparse, got) = gradients(net, True), gradients(net, False, checkpointing=checkpointing)
    assert (out - sparse).abs().max() <= 1e-10 * out.abs().max()
    assert all(value.abs().max() > 0 for name, value in expected.items() if "gumbel" in name)
    assert_equal(got, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("name", ["SiT-T-1-2", "MAR-T-1-2"])
def test_other_families(name, update, checkpointing):
    torch.manual_seed(0)
    net = create_model(name, input_size=8, in_channels=3, num_classes=5).train().to(DEVICE)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    weight_update(net, *UPDATES[update])
    objective = family_of(name).make_objective(**family_of(name).own_defaults("train"))
    step = TrainStep(net.double(), objective)
    x, y, found = torch.randn(6, 3, 8, 8).double(), torch.arange(6) % 5, []
    for dense in (True, False):
        for stack in block_stacks(net):
            stack.dense, stack.checkpointing = dense, checkpointing and not dense
        torch.manual_seed(1)
        net.zero_grad(set_to_none=True)
        step(x, y)["loss"].mean().backward()
        found.append({key: p.grad for key, p in net.named_parameters() if p.requires_grad})
    expected, got = found
    assert all(value.abs().max() > 0 for key, value in expected.items() if "gumbel" in key)
    assert_equal(got, expected)


@pytest.mark.parametrize("kept", [0, 1])
def test_layers_that_all_or_no_samples_keep(kept):
    """Every parameter gets a gradient, if only of zeros: DDP waits for all of them."""
    net = gated_net("1:2")
    masks = [torch.full((6, 6), 1.0 - kept, dtype=torch.float64) for _ in range(2)]
    for mask in masks:
        mask[:, 2] = kept
        mask.requires_grad_()
    expected, got = (gradients(net, dense, mask)[1] for dense, mask in zip((True, False), masks, strict=True))
    got = {name: value for name, value in got.items() if "gumbel" not in name}
    assert all(value is not None for value in got.values())
    assert_equal(got | {"mask": masks[1].grad}, {name: expected.get(name) for name in got} | {"mask": masks[0].grad})


def test_mask_without_gradient_runs_no_skipped_sample():
    class Count(nn.Linear):
        rows = 0

        def forward(self, x):
            self.rows += len(x)
            return super().forward(x)

    stack = BlockStack([Count(3, 3), Count(3, 3)])
    stack(torch.randn(4, 2, 3), mask=torch.tensor([[1.0, 0], [0, 0], [1, 0], [0, 1]]))
    assert [block.rows for block in stack] == [2, 1]


def test_autocast_keeps_the_gradients_of_weights():
    """Autocast keeps its copy of a weight; made without gradients first, it would cut the weight off."""
    net = gated_net("1:2", dtype=torch.float32)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        (_, expected), (_, got) = gradients(net, True), gradients(net, False)
    assert_equal(got, expected, 0.1)


def test_share_of_skipped_samples_is_unbiased():
    """The mean gate gradient over many draws is within the standard error of the exact one, and costs less."""
    gates, stack = LayerGates([[1, 2]] * 2, 4).to(DEVICE), BlockStack(nn.Linear(3, 3).double() for _ in range(4))
    torch.manual_seed(0)
    mask = gates.draw(10).detach().double()
    x, goal = torch.randn(2, 10, 2, 3, dtype=torch.float64)

    def gate_gradient(share):
        stack.gate_samples, drawn = share, mask.clone().requires_grad_()
        (stack(x, mask=drawn) * goal).sum().backward()
        return drawn.grad

    exact, draws = gate_gradient(1.0), torch.stack([gate_gradient(0.25) for _ in range(2000)])
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - exact).abs() <= 4.5 * error + 1e-12).all()
    skipped = draws[:, mask == 0]
    assert (skipped != 0).double().mean().item() == pytest.approx(0.25, abs=0.01)
    assert torch.allclose(draws[0][mask == 1], exact[mask == 1])
