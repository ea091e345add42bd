"""Names of networks, and what weights tell about theirs."""

import pytest
import torch

from families import create_model, depth_name, describe_weights, family_of, model_config, name_of, stack_layers
from models import SIZES, DiT, DiT_models

XL = {"hidden_size": 1152, "num_heads": 16}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("DiT-XL/2", {**XL, "depth": 28, "patch_size": 2}),
        ("DiT-D14/2", {**XL, "depth": 14, "patch_size": 2}),
        ("DiT-D16/2", {**XL, "depth": 16, "patch_size": 2}),
        ("DiT-XL-D16/2", {**XL, "depth": 16, "patch_size": 2}),
        ("DiT-D5/4", {**XL, "depth": 5, "patch_size": 4}),
        ("DiT-B-D30/8", {"hidden_size": 768, "num_heads": 12, "depth": 30, "patch_size": 8}),
        ("DiT-T-D6/2", {**SIZES["T"], "depth": 6, "patch_size": 2}),
        ("DiT-T-1-2", {**SIZES["T"], "patch_size": 2, "groups": [[1, 2]] * 6}),
        ("DiT-D14-2-4", {**XL, "depth": 14, "patch_size": 2, "groups": [[2, 4]] * 3 + [[1, 2]]}),
    ],
)
def test_grammar(name, expected):
    assert model_config(name) == expected


@pytest.mark.parametrize(
    "name", ["", "DiT", "DiT-Q/2", "DiT-D0/2", "DiT-D16/3", "DiT-D16", "dit-XL/2", "XL/2", "DiT-D8+8/2"]
)
def test_unknown_names(name):
    with pytest.raises(ValueError, match=r"is no model: expected one of DiT-XL/2, .*DiT-D16/2"):
        model_config(name)


def test_config_is_a_copy():
    model_config("DiT-XL/2")["depth"] = 1
    assert model_config("DiT-XL/2")["depth"] == 28


def test_all_names_build():
    published = {f"DiT-{size}/{patch}" for size in ("XL", "L", "B", "S") for patch in (2, 4, 8)}
    published |= {"DiT-D19/2", "DiT-D14/2", "DiT-D7/2", "DiT-XL-1-2", "DiT-XL-2-4", "DiT-XL-7-14", "DiT-XL-1-4"}
    published |= {"DiT-D14-1-2", "DiT-D14-2-4"}
    assert published <= set(DiT_models)
    for name in DiT_models:
        with torch.device("meta"):
            net = create_model(name, input_size=8)
        assert isinstance(net, DiT)
        assert len(net.blocks) == model_config(name)["depth"]
        assert hasattr(net, "gumbel_gates") == ("groups" in model_config(name))
    assert family_of("DiT-XL/2").network is DiT


@pytest.mark.parametrize(
    ("name", "depths", "pruned"),
    [
        ("DiT-XL-1-2", [14], "DiT-D14/2"),
        ("DiT-XL/2", [16], "DiT-D16/2"),
        ("DiT-D14-2-4", [7], "DiT-D7/2"),
        ("DiT-D19/2", [28], "DiT-XL/2"),
        ("DiT-XL/4", [14], "DiT-D14/4"),
        ("DiT-S/4", [6], "DiT-S-D6/4"),
        ("DiT-S/4", [12], "DiT-S/4"),
        ("DiT-T-1-2", [6], "DiT-T-D6/2"),
        ("SiT-XL-1-2", [14], "SiT-D14/2"),
        ("SiT-T/4", [6], "SiT-T-D6/4"),
        ("MAR-L-1-2", [8, 8], "MAR-D16"),
        ("MAR-L", [16, 16], "MAR-L"),
        ("MAR-L", [6, 10], "MAR-D6+10"),
        ("MAR-B", [6, 6], "MAR-B-D12"),
        ("MAR-T-1-2", [3, 3], "MAR-T-D6"),
        ("MAR-T", [1, 5], "MAR-T-D1+5"),
    ],
)
def test_depth_name(name, depths, pruned):
    assert depth_name(name, depths) == pruned
    assert stack_layers(pruned) == tuple(depths)


def test_name_of_unknown_width():
    assert name_of(17, [4], 2) is None


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DiT-T/2", {"input_size": 8, "in_channels": 3, "num_classes": 10, "learn_sigma": True}),
        ("DiT-T-D5/4", {"input_size": 16, "in_channels": 4, "num_classes": 7, "learn_sigma": False}),
        ("DiT-D14/2", {"input_size": 64, "in_channels": 4, "num_classes": 1000, "learn_sigma": True}),
        ("SiT-T-D5/4", {"input_size": 16, "in_channels": 4, "num_classes": 7, "learn_sigma": False}),
        ("MAR-T-D2+3", {"input_size": 8, "in_channels": 3, "num_classes": 10}),
    ],
)
def test_describe_weights(name, config):
    with torch.device("meta"):
        state = create_model(name, **config).state_dict()
    facts = {"model": name, "hidden_size": model_config(name)["hidden_size"], "depths": stack_layers(name)}
    assert describe_weights(state, name) == {**facts, **config}


@pytest.mark.parametrize("name", ["SiT-D16/2x", "MAR-D0", "MAR-D15", "MAR-D4+4+4", "MAR-D16/2", "SiT-Q/2"])
def test_unknown_names_of_other_families(name):
    with pytest.raises(ValueError, match=r"is no model|are no two halves"):
        model_config(name)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        *(("SiT-XL/2", 675_129_632), ("SiT-D14/2", 340_457_504), ("SiT-L/2", 458_102_816), ("SiT-S/2", 32_963_360)),
        *(("MAR-B", 207_924_768), ("MAR-L", 478_326_304), ("MAR-H", 942_403_104), ("MAR-D16", 276_786_720)),
        ("MAR-D6+10", 276_786_720),
    ],
)
def test_parameter_counts(name, parameters):
    with torch.device("meta"):
        net = create_model(name)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert family_of(name).name == name[:3]


@pytest.mark.parametrize("state", [{}, {"weight": torch.zeros(2)}, {"x_embedder.proj.weight": torch.zeros(3)}])
def test_describe_other_weights(state):
    with pytest.raises(ValueError, match="no DiT weights"):
        describe_weights(state)
