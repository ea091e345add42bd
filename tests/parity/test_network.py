"""The plain network: outputs, block by block, label drops, guidance, initial values, sizes and state-dict layouts."""

import math

import pytest
import torch

from models import DiT, DiT_models, TimestepEmbedder

from .golden import Golden, names, precisions, read_json, recorded_network

FORWARD = pytest.mark.parametrize("name", names("dit_forward_*.npz"))
COUNTS, LAYOUTS = read_json("parameter_counts.json"), read_json("state_dict_shapes.json")
# Deliberate difference: the published groups of this name cover 28 layers of a 14-layer network, which cannot run.
CORRECTED_GROUPS = {"DiT-D14-2-4": [[2, 4], [2, 4], [2, 4], [1, 2]]}


def load(name, dtype):
    z = Golden(name, dtype)
    return z, recorded_network(z, class_dropout_prob=z.meta["dropout_prob"])


@FORWARD
@precisions
@torch.no_grad()
def test_output_and_every_block(name, dtype):
    z, net = load(name, dtype)
    tokens = {}
    out = net(z["x"], z["t"], z["y"], observe=lambda layer, before, after: tokens.update({layer: after}))
    z.check("out", out, "network")
    z.check("block_out", torch.stack([tokens[layer] for layer in range(z.meta["config"]["depth"])]), "network")


@FORWARD
def test_embeddings(name):
    z, net = load(name, torch.float32)
    z.check("pos_embed", net.pos_embed, "network")
    z.check("t_sinusoid", TimestepEmbedder.sinusoid(z["t"]), "network")


@FORWARD
@precisions
@torch.no_grad()
def test_guidance(name, dtype):
    z, net = load(name, dtype)
    out = net.forward_with_cfg(z["cfg_x"], z["cfg_t"], z["cfg_y"], z.meta["cfg_scale"])
    z.check("out_cfg", out, "network")


@FORWARD
@precisions
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_forced_label_drop(name, dtype, training):
    z, net = load(name, dtype)
    out = net.train(training)(z["x"], z["t"], z["y"], drop=z["drop_ids"].bool())
    z.check(f"out_{'train' if training else 'eval'}_forced_drop", out, "network")


@FORWARD
@precisions
@torch.no_grad()
def test_random_label_drop(name, dtype, monkeypatch):
    z, net = load(name, dtype)
    net.train()
    monkeypatch.setattr(torch, "rand", lambda *size, **options: z["drop_uniform"].reshape(*size))
    z.check("drop_flags", net.y_embedder.draw_drop(len(z["x"]), "cpu"), "exact")
    z.check("out_train_random_drop", net(z["x"], z["t"], z["y"]), "network")


def test_initial_values():
    recorded = read_json("init_summary.json")
    torch.manual_seed(0)
    parameters = dict(DiT(**recorded["config"]).named_parameters())
    assert list(parameters) == list(recorded["parameters"]), "init_summary.json: parameters"
    for name, facts in recorded["parameters"].items():
        p, what = parameters[name], f"init_summary.json: {name}"
        assert list(p.shape) == facts["shape"], f"{what} shape"
        assert p.requires_grad == facts["requires_grad"], f"{what} requires_grad"
        assert (not p.any()) == facts["all_zero"], f"{what} all_zero"
        # Two random draws: the same distribution, not the same values.
        assert p.std(correction=0).item() == pytest.approx(facts["std"], rel=0.25), f"{what} std"
        assert p.abs().max().item() == pytest.approx(facts["max_abs"], rel=0.4), f"{what} max_abs"


def build(name, source):
    with torch.device("meta"):
        return DiT_models[name](input_size=source["input_size"], num_classes=source["num_classes"])


@pytest.mark.parametrize("name", COUNTS["models"])
def test_registered_sizes(name):
    net, facts = build(name, COUNTS), COUNTS["models"][name]
    what = f"parameter_counts.json: {name}"
    block = net.blocks[0]
    found = {
        "depth": len(net.blocks),
        "hidden_size": block.attn.qkv.in_features,
        "patch_size": net.patch_size,
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / block.mlp.fc1.in_features,
    }
    assert found == {key: facts[key] for key in found}, what
    groups, gates, covered = facts["groups"], facts["gates"], facts["layers_covered_by_groups"]
    if name in CORRECTED_GROUPS:
        groups, covered = CORRECTED_GROUPS[name], facts["depth"]
        gates = sum(math.comb(m, n) for n, m in groups)
    mine = getattr(net, "gumbel_gates", None)
    assert (mine and [list(group) for group in mine.groups]) == groups, f"{what} groups"
    assert (mine and sum(m for _, m in mine.groups)) == covered, f"{what} layers_covered_by_groups"
    assert sum(p.numel() for p in mine or []) == gates, f"{what} gates"
    total = sum(p.numel() for p in net.parameters())
    trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert total == facts["total"] - facts["gates"] + gates, f"{what} total"
    assert trainable == facts["trainable"] - facts["gates"] + gates, f"{what} trainable"
    assert trainable - gates == facts["without_pos_embed_and_gates"], f"{what} without_pos_embed_and_gates"


def test_corrected_groups_differ_from_the_recorded_ones():
    for name, groups in CORRECTED_GROUPS.items():
        facts = COUNTS["models"][name]
        assert facts["layers_covered_by_groups"] != facts["depth"], f"parameter_counts.json: {name}"
        with pytest.raises(ValueError, match="covers"), torch.device("meta"):
            DiT_models[name](groups=facts["groups"])
        assert sum(m for _, m in groups) == facts["depth"], f"groups for {name}"


@pytest.mark.parametrize("name", LAYOUTS["models"])
def test_state_dict_layout(name):
    facts, state = LAYOUTS["models"][name], build(name, LAYOUTS).state_dict()
    keys, what = [[key, list(value.shape)] for key, value in state.items()], f"state_dict_shapes.json: {name}"
    gates = [entry for entry in keys if entry[0].startswith("gumbel_gates.")]
    if "only_gates" in facts:
        expected = facts["only_gates"]
        if name in CORRECTED_GROUPS:
            sizes = [math.comb(m, n) for n, m in CORRECTED_GROUPS[name]]
            expected = [[f"gumbel_gates.{g}", [1, size]] for g, size in enumerate(sizes)]
        assert gates == expected, f"{what} gates"
        assert keys.index(gates[0]) == facts["position_of_first_gate"], f"{what} position of the first gate"
        assert len(keys) - len(gates) == facts["n_keys"] - len(facts["only_gates"]), f"{what} number of keys"
    else:
        blocks = [[f"blocks.{i}.{key}", shape] for i in range(facts["depth"]) for key, shape in facts["block"]]
        assert keys == facts["before"] + blocks + facts["after"], what
        assert len(keys) == facts["n_keys"], f"{what} number of keys"
