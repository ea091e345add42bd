"""The plain network: outputs, block by block, label drops, guidance, initial values, sizes and state-dict layouts."""

import math

import pytest
import torch

from models import DiT, DiT_models, TimestepEmbedder

from .golden import Golden, given_uniforms, names, precisions, read_json, recorded_network

FORWARD = pytest.mark.parametrize("name", names("dit_forward_*.npz"))
COUNTS, LAYOUTS = read_json("parameter_counts.json"), read_json("state_dict_shapes.json")
# Deliberate difference: the published groups of this name cover 28 layers of a 14-layer network, which cannot run.
CORRECTED_GROUPS = {"DiT-D14-2-4": [[2, 4], [2, 4], [2, 4], [1, 2]]}
RUNS = {
    "out_cfg": lambda net, z: net.forward_with_cfg(z["cfg_x"], z["cfg_t"], z["cfg_y"], z.meta["cfg_scale"]),
    "out_eval_forced_drop": lambda net, z: net.eval()(z["x"], z["t"], z["y"], drop=z["drop_ids"].bool()),
    "out_train_forced_drop": lambda net, z: net.train()(z["x"], z["t"], z["y"], drop=z["drop_ids"].bool()),
}


def load(name, dtype):
    z = Golden(name, dtype)
    return z, recorded_network(z, class_dropout_prob=z.meta["dropout_prob"])


@FORWARD
@precisions
@torch.no_grad()
def test_embeddings_blocks_and_output(name, dtype):
    z, net = load(name, dtype)
    tokens = {}
    out = net(z["x"], z["t"], z["y"], observe=lambda layer, before, after: tokens.update({layer: after}))
    z.check("out", out, "network")
    z.check("block_out", torch.stack([tokens[layer] for layer in range(z.meta["config"]["depth"])]), "network")
    z.check("pos_embed", net.pos_embed, "network")
    z.check("t_sinusoid", TimestepEmbedder.sinusoid(z["t"]), "network")


@FORWARD
@precisions
@pytest.mark.parametrize("key", RUNS)
@torch.no_grad()
def test_guidance_and_forced_label_drop(name, dtype, key):
    z, net = load(name, dtype)
    z.check(key, RUNS[key](net, z), "network")


@FORWARD
@precisions
@torch.no_grad()
def test_random_label_drop(name, dtype):
    z, net = load(name, dtype)
    with given_uniforms(z["drop_uniform"]):
        z.check("drop_flags", net.train().draw_drop(len(z["x"]), "cpu"), "exact")
        z.check("out_train_random_drop", net(z["x"], z["t"], z["y"]), "network")


def test_initial_values():
    recorded = read_json("init_summary.json")
    torch.manual_seed(0)
    parameters = dict(DiT(**recorded["config"]).named_parameters())
    assert list(parameters) == list(recorded["parameters"]), "init_summary.json: parameters"
    for name, facts in recorded["parameters"].items():
        p = parameters[name]
        found = {"shape": list(p.shape), "requires_grad": p.requires_grad, "all_zero": not p.any()}
        # Two random draws: the same distribution, not the same values.
        found["std"] = pytest.approx(p.std(correction=0).item(), rel=0.25)
        found["max_abs"] = pytest.approx(p.abs().max().item(), rel=0.4)
        assert found == facts, f"init_summary.json: {name}"


def build(name, source):
    with torch.device("meta"):
        return DiT_models[name](input_size=source["input_size"], num_classes=source["num_classes"])


def corrected_counts(name):
    facts, groups = COUNTS["models"][name], CORRECTED_GROUPS.get(name)
    if groups is None:
        return facts
    gates = sum(math.comb(m, n) for n, m in groups)
    changed = {key: facts[key] - facts["gates"] + gates for key in ("total", "trainable")}
    return facts | changed | {"groups": groups, "gates": gates, "layers_covered_by_groups": facts["depth"]}


@pytest.mark.parametrize("name", COUNTS["models"])
def test_registered_sizes(name):
    net = build(name, COUNTS)
    block, gates = net.blocks[0], getattr(net, "gumbel_gates", None)
    sizes = {p: p.numel() for p in net.parameters()}
    gate_size = sum(sizes[p] for p in gates or [])
    trainable = sum(size for p, size in sizes.items() if p.requires_grad)
    found = {
        "total": sum(sizes.values()),
        "trainable": trainable,
        "without_pos_embed_and_gates": trainable - gate_size,
        "gates": gate_size,
        "depth": len(net.blocks),
        "hidden_size": block.attn.qkv.in_features,
        "patch_size": net.patch_size,
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / block.mlp.fc1.in_features,
        "groups": gates and [list(group) for group in gates.groups],
        "layers_covered_by_groups": gates and sum(m for _, m in gates.groups),
    }
    assert found == corrected_counts(name), f"parameter_counts.json: {name}"


@pytest.mark.parametrize("name", CORRECTED_GROUPS)
def test_recorded_groups_that_cannot_run_are_refused(name):
    with pytest.raises(ValueError, match="covers"), torch.device("meta"):
        DiT_models[name](groups=COUNTS["models"][name]["groups"])


@pytest.mark.parametrize("name", LAYOUTS["models"])
def test_state_dict_layout(name):
    facts, what = LAYOUTS["models"][name], f"state_dict_shapes.json: {name}"
    keys = [[key, list(value.shape)] for key, value in build(name, LAYOUTS).state_dict().items()]
    if "only_gates" in facts:
        sizes = [math.comb(m, n) for n, m in CORRECTED_GROUPS.get(name, [])]
        expected = [[f"gumbel_gates.{g}", [1, size]] for g, size in enumerate(sizes)] or facts["only_gates"]
        first = facts["position_of_first_gate"]
        assert keys[first : first + len(expected)] == expected, f"{what} gates"
        assert len(keys) - len(expected) == facts["n_keys"] - len(facts["only_gates"]), f"{what} number of keys"
    else:
        blocks = [[f"blocks.{i}.{key}", shape] for i in range(facts["depth"]) for key, shape in facts["block"]]
        assert keys == facts["before"] + blocks + facts["after"], what
        assert len(keys) == facts["n_keys"], f"{what} number of keys"
