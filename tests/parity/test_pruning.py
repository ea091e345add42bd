"""Pruning without learning: block influence, index lists, and the blocks of a decision in the pruned weights."""

import pytest
import torch

from pruning.scores import BlockInfluence, least_influential
from pruning.surgery import keep_layers, stack_depths

from .golden import Golden, network, precisions, read_json, recorded_network

INDEX, DECISIONS = read_json("prune_by_index.json"), Golden("decisions.npz")


def origins(pruned, original):
    """For every block of `pruned` the first block of `original` with the same weights in all its parameters."""
    names = [key.removeprefix("blocks.0.") for key in original if key.startswith("blocks.0.")]

    def same(i, j):
        return all(torch.equal(pruned[f"blocks.{i}.{name}"], original[f"blocks.{j}.{name}"]) for name in names)

    new, old = (range(stack_depths(state)["blocks"]) for state in (pruned, original))
    return [next(j for j in old if same(i, j)) for i in new]


@precisions
@torch.no_grad()
def test_block_influence(dtype):
    z = Golden("bi_scores.npz", dtype)
    net, depth, per_batch = recorded_network(z), z.meta["config"]["depth"], []
    influence = BlockInfluence(depth)
    for batch in zip(z["x"], z["t"], z["y"], strict=True):
        per_batch.append(BlockInfluence(depth))
        for observe in (influence, per_batch[-1]):
            net(*batch, observe=observe)
    z.check("scores", influence.scores(), "network")
    if dtype == torch.float64:
        z.check("scores_per_batch", torch.stack([one.scores() for one in per_batch], dim=1), "network")
    removed = least_influential(influence.scores(), z.meta["n_pruned"])
    kept = [layer for layer in range(depth) if layer not in removed]
    z.check("removed", removed, "exact")
    z.check("kept", kept, "exact")
    z.check("saved_block_origin", origins(keep_layers(net.state_dict(), kept), net.state_dict()), "exact")


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
    has_gates = any(name.startswith("gumbel_gates") for name in pruned)
    expected = [case["n_saved_keys"], case["saved_keys_have_gates"]]
    assert [len(pruned), has_gates] == expected, f"{z.name}: saved keys of {key}"
    others = [name for name in pruned if not name.startswith("blocks.")]
    assert all(torch.equal(pruned[name], state[name]) for name in others), f"{z.name}: {key} weights outside the blocks"
