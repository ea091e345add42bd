"""Pruning without learning: block influence, index lists, and the blocks of a decision in the pruned weights."""

import pytest
import torch

from pruning.scores import BlockInfluence, least_influential
from pruning.surgery import keep_layers

from .golden import Golden, network, precisions, read_json, recorded_network

INDEX, DECISIONS = read_json("prune_by_index.json"), Golden("decisions.npz")


def block(state, i):
    prefix = f"blocks.{i}."
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def origins(pruned, original):
    """For every block of `pruned` the block of `original` with the same weights."""

    def same(i, j):
        mine, other = block(pruned, i), block(original, j)
        return mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)

    new, old = (len({key.split(".")[1] for key in state if key.startswith("blocks.")}) for state in (pruned, original))
    return [next(j for j in range(old) if same(i, j)) for i in range(new)]


@precisions
@torch.no_grad()
def test_block_influence(dtype):
    z = Golden("bi_scores.npz", dtype)
    net, per_batch = recorded_network(z), []
    influence = BlockInfluence(z.meta["config"]["depth"])
    for x, t, y in zip(z["x"], z["t"], z["y"], strict=True):
        one = BlockInfluence(z.meta["config"]["depth"])
        net(x, t, y, observe=influence)
        net(x, t, y, observe=one)
        per_batch.append(one.scores())
    z.check("scores", influence.scores(), "network")
    if dtype == torch.float64:
        z.check("scores_per_batch", torch.stack(per_batch, dim=1), "network")
    removed = least_influential(influence.scores(), z.meta["n_pruned"])
    z.check("removed", removed, "exact")
    kept = [layer for layer in range(len(net.blocks)) if layer not in removed]
    z.check("kept", kept, "exact")
    state = net.state_dict()
    z.check("saved_block_origin", origins(keep_layers(state, kept), state), "exact")


@pytest.mark.parametrize("name", INDEX["cases"])
def test_index_list(name):
    state = network(INDEX["config"], INDEX["weight_seed"], INDEX["weight_std"]).state_dict()
    case, what = INDEX["cases"][name], f"prune_by_index.json: {name}"
    requested = case["requested"]
    usable = [layer for layer in dict.fromkeys(requested) if 0 <= layer < INDEX["config"]["depth"]]
    pruned = keep_layers(state, usable)
    assert origins(pruned, state) == case["saved_block_origin"], f"{what} saved_block_origin"
    if case["keys"]:
        assert [[key, list(value.shape)] for key, value in pruned.items()] == case["keys"], f"{what} keys"
    if usable != requested:  # deliberate difference: repeated and impossible indices used to be dropped silently
        with pytest.raises(ValueError, match="layer"):
            keep_layers(state, requested)


@pytest.mark.parametrize("case", DECISIONS.meta["cases"], ids=lambda case: case["key"])
def test_blocks_of_a_decision(case):
    z, key = DECISIONS, case["key"]
    state = network(case["config"], case["weight_seed"], case["weight_std"]).state_dict()
    pruned = keep_layers(state, case["kept"])
    z.check(f"{key}.saved_block_origin", origins(pruned, state), "exact")
    assert len(pruned) == case["n_saved_keys"], f"{z.name}: {key} n_saved_keys"
    has_gates = any(name.startswith("gumbel_gates") for name in pruned)
    assert has_gates == case["saved_keys_have_gates"], f"{z.name}: {key} saved_keys_have_gates"
    others = [name for name in pruned if not name.startswith("blocks.")]
    assert all(torch.equal(pruned[name], state[name]) for name in others), f"{z.name}: {key} weights outside the blocks"
