"""Gates: candidate tables, masked and straight-through passes with given noise, decisions."""

import re

import pytest
import torch
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


def draw_gradients(gates, gumbel):
    """Gradients of the drawn masks, weighted per layer, with respect to each gate's logits; and those weights."""
    mask = gates.draw(len(gumbel[0]), gumbel)
    weights = torch.linspace(-1, 2, mask.shape[1], dtype=mask.dtype)
    grads = torch.autograd.grad((mask * weights).sum(), list(gates))
    return grads, weights.split([m for _, m in gates.groups])


def softmax_gradient(soft, table, weights, gates):
    """What `draw_gradients` has to be if the softmax over the candidates is `soft` (N, candidates)."""
    values = table.to(soft.dtype) @ weights.to(soft.dtype)
    return (gates.scaling / gates.tau * soft * (values - soft @ values[:, None])).sum(0, keepdim=True)


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
        z.check(f"gate_{g}", gate, "exact" if dtype == torch.float32 else "network")
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
    grads, weights = draw_gradients(gates, gumbel)
    for g, grad in enumerate(grads):
        table, soft = z[f"options_{g}"], torch.as_tensor(z.arrays[f"soft_{g}"])
        chosen = table[z[f"chosen_{g}"]].to(dtype)
        assert torch.equal(masks[g], chosen), f"{name}: chosen_{g}"
        expected = softmax_gradient(soft, table, weights[g], gates)
        limit = 1e-4 if dtype == torch.float32 else 1e-8
        assert (grad - expected).abs().max() <= limit * gates.scaling / gates.tau, f"{name}: soft_{g}"


def decided_gates(case, dtype=torch.float32):
    gates = LayerGates(case["config"]["groups"], case["config"]["depth"])
    for g, gate in enumerate(gates):
        gate.data = DECISIONS[f"{case['key']}.gate_{g}"].float()
    return gates.to(dtype)


@CASES
def test_decision(case):
    z, key = DECISIONS, case["key"]
    decision = decide(decided_gates(case))
    assert decision.kept == case["kept"] == z[f"{key}.kept"].tolist(), f"{z.name}: {key}.kept"
    confidence = torch.tensor(decide(decided_gates(case, torch.float64)).confidence)
    z.check(f"{key}.confidence_scaling_1", confidence.double(), "loss")


@CASES
def test_softmaxes_behind_a_decision(case):
    z, prefix = DECISIONS, f"{case['key']}.softmax_"
    found = z.keys(prefix)
    assert found, f"{z.name}: {prefix}*"
    gates = decided_gates(case, torch.float64)
    for key in found:
        g, scaling = re.fullmatch(r"(\d+)_scaling_(.+)", key).groups()
        gates.scaling = float(scaling)
        confidence, soft = decide(gates).confidence[int(g)], z[prefix + key]
        assert confidence == pytest.approx(soft.max().item(), rel=1e-6), f"{z.name}: {prefix}{key}"
        grads, weights = draw_gradients(gates, [torch.zeros_like(gate) for gate in gates])
        expected = softmax_gradient(soft, gates.get_buffer(f"candidates_{g}"), weights[int(g)], gates)
        assert (grads[int(g)] - expected).abs().max() <= 1e-6 * gates.scaling, f"{z.name}: {prefix}{key}"
