"""Gates: candidate tables, masked and straight-through passes with given noise, decisions."""

import re

import pytest
import torch
from machine import DEVICE
from torch.nn import functional as F

from pruning.gates import LayerGates, decide
from pruning.patterns import candidate_masks

from .golden import Golden, names, precisions, recorded_network

MASKED = pytest.mark.parametrize("name", names("masked_forward_*.npz"))
DECISIONS = Golden("decisions.npz")
CASES = pytest.mark.parametrize("case", DECISIONS.meta["cases"], ids=lambda case: case["key"])


def load(name, dtype):
    z = Golden(name, dtype)
    net = recorded_network(z, gate_std=z.meta["gate_std"])
    net.gumbel_gates.tau, net.gumbel_gates.scaling = z.meta["tau"], z.meta["scaling"]
    return z, net, [z[f"gumbel_{g}"] for g in range(len(net.gumbel_gates))]


def assert_softmaxes(gates, gumbel, recorded, limit, what):
    """Check the softmaxes {group: (N, candidates)} behind a draw by the gradient of weighted masks, which they fix."""
    mask = gates.draw(len(gumbel[0]), gumbel)
    weights = torch.linspace(-1, 2, mask.shape[1], dtype=mask.dtype)
    grads = torch.autograd.grad((mask * weights).sum(), list(gates))
    parts = weights.split([m for _, m in gates.groups])
    for g, soft in recorded.items():
        values = gates.get_buffer(f"candidates_{g}") @ parts[g]
        expected = (soft * (values - soft @ values[:, None])).sum(0, keepdim=True)
        error = (grads[g] * gates.tau / gates.scaling - expected).abs().max().item()
        assert error <= limit, f"{what}: group {g} is off by {error:.3g}"


def test_candidate_tables():
    z = Golden("option_tables.npz")
    for key in z.keys("options_"):
        z.check(f"options_{key}", candidate_masks(*map(int, key.split("_"))), "exact")


@MASKED
@precisions
@torch.no_grad()
def test_given_choices(name, dtype):
    z, net, _ = load(name, dtype)
    tables = [net.gumbel_gates.get_buffer(f"candidates_{g}") for g in range(len(net.gumbel_gates))]
    assert [len(table) for table in tables] == z.meta["n_options"], f"{name}: n_options"
    for g, (gate, table) in enumerate(zip(net.gumbel_gates, tables, strict=True)):
        z.check(f"gate_{g}", gate, "exact")
        z.check(f"options_{g}", table, "exact")
    mask = torch.cat([table[z["choices"][:, g]] for g, table in enumerate(tables)], dim=1)
    z.check("out_given_choices", net(z["x"], z["t"], z["y"], mask=mask), "network")


@MASKED
@precisions
def test_straight_through_pass(name, dtype):
    z, net, gumbel = load(name, dtype)
    out = net(z["x"], z["t"], z["y"], mask=net.gumbel_gates.draw(len(z["x"]), gumbel))
    loss = F.mse_loss(out, z["target"])
    loss.backward()
    z.check("out_st", out, "network")
    z.check("loss_st", loss, "network")
    for g, gate in enumerate(net.gumbel_gates):
        z.check(f"gate_grad_{g}", gate.grad, "gate gradient")
    for parameter in z.keys("grad:"):
        z.check(f"grad:{parameter}", net.get_parameter(parameter).grad, "gate gradient")


@MASKED
@precisions
def test_drawn_candidates_and_their_softmax(name, dtype):
    z, net, gumbel = load(name, dtype)
    gates = net.gumbel_gates
    masks = gates.draw(len(gumbel[0]), gumbel).split([m for _, m in gates.groups], dim=1)
    for g, mask in enumerate(masks):
        assert torch.equal(mask, z[f"options_{g}"][z[f"chosen_{g}"]].to(dtype)), f"{name}: chosen_{g}"
    recorded = {g: z[f"soft_{g}"] for g in range(len(gates))}
    assert_softmaxes(gates, gumbel, recorded, 1e-4 if dtype == torch.float32 else 1e-8, f"{name}: soft_*")


def decided_gates(case, dtype):
    gates = LayerGates(case["config"]["groups"], case["config"]["depth"])
    for g, gate in enumerate(gates):
        gate.data = DECISIONS[f"{case['key']}.gate_{g}"].float()
    return gates.to(DEVICE, dtype)


@CASES
@precisions
def test_decision(case, dtype):
    z, key = Golden(DECISIONS.name, dtype), case["key"]
    decision = decide(decided_gates(case, dtype))
    assert decision.kept == case["kept"], f"{z.name}: kept of {key} in meta"
    z.check(f"{key}.kept", decision.kept, "exact")
    z.check(f"{key}.confidence_scaling_1", torch.tensor(decision.confidence), "loss")


@CASES
def test_softmaxes_behind_a_decision(case):
    z, prefix, gates = DECISIONS, f"{case['key']}.softmax_", decided_gates(case, torch.float64)
    for key in z.keys(prefix):
        g, scaling = re.fullmatch(r"(\d+)_scaling_(.+)", key).groups()
        gates.scaling = float(scaling)
        confidence, soft = torch.tensor(decide(gates).confidence[int(g)]), z[prefix + key]
        z.check(prefix + key, confidence, "loss", torch.max)
        silence = [torch.zeros_like(gate) for gate in gates]
        assert_softmaxes(gates, silence, {int(g): soft}, 1e-8, f"{z.name}: {prefix}{key}")
