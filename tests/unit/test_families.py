"""Names of networks, and what weights tell about theirs."""

import ast
import inspect
import subprocess
import sys

import pytest
import torch

import diffusion.masked
from diffusion import flow
from diffusion.flow import OdeSampler, SdeSampler
from families import FAMILIES, create_model, depth_name, describe_shapes, family_of, model_config, stack_layers
from families.dit import DIT, SIZES
from families.mar import SCHEDULES
from families.names import write_name
from families.protocols import Network, Objective
from families.sit import LAST_STEPS, LOSS_WEIGHTS, NOISE_FORMS, PATHS, PREDICTIONS
from models import DiT, DiT_models, SiT
from pruning.gates import block_stacks

NAMED = [name for name in FAMILIES if not FAMILIES[name].find_model]  # whose models have names, not folders
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
    with pytest.raises(ValueError, match=r"is not a model name: expected one of DiT-XL/2, .*DiT-D16/2"):
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
    assert family_of("DiT-XL/2").network == "models.DiT"


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
    assert write_name(DIT, 17, [4], 2) is None


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
def test_describe_shapes(name, config):
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in create_model(name, **config).state_dict().items()}
    facts = {"model": name, "hidden_size": model_config(name)["hidden_size"], "depths": stack_layers(name)}
    assert describe_shapes(shapes, name) == {**facts, **config}


@pytest.mark.parametrize("name", ["SiT-D16/2x", "MAR-D0", "MAR-D15", "MAR-D4+4+4", "MAR-D16/2", "SiT-Q/2"])
def test_unknown_names_of_other_families(name):
    with pytest.raises(ValueError, match=r"is not a model name|cannot be cut into two halves"):
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


@pytest.mark.parametrize("shapes", [{}, {"weight": (2,)}, {"x_embedder.proj.weight": (3,)}])
def test_describe_other_weights(shapes):
    with pytest.raises(ValueError, match="not the weights of a DiT"):
        describe_shapes(shapes)


def test_names_of_choices():
    """The tables of flags, which import no torch, list what the code that needs it has."""
    assert set(PATHS) == set(flow.PATHS)
    assert {None, *LOSS_WEIGHTS} == set(flow.LOSS_WEIGHTS)
    assert set(SCHEDULES) == set(diffusion.masked.GUIDANCE)
    tree = ast.parse(inspect.getsource(flow.diffusion_coefficient))
    (forms,) = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    assert tuple(map(ast.literal_eval, forms.keys)) == NOISE_FORMS


def test_every_form_of_noise():
    """Each is another function of time, of the shape of time, and no other name is taken."""
    t = torch.tensor([0.2, 0.4])
    found = {tuple(flow.diffusion_coefficient(form, 0.7, t, flow.gvp_path(t)).tolist()) for form in NOISE_FORMS}
    assert {len(values) for values in found} == {2}
    assert len(found) == len(NOISE_FORMS)
    with pytest.raises(KeyError):
        flow.diffusion_coefficient("Sigma", 0.7, t, flow.gvp_path(t))


@pytest.mark.parametrize(
    ("option", "choices"), [("last_step", LAST_STEPS), ("prediction", PREDICTIONS), ("diffusion_form", NOISE_FORMS)]
)
def test_every_choice_of_the_sde(option, choices):
    """Each gives other samples; on the linear path two forms of noise would be one."""
    torch.manual_seed(0)
    net = SiT(4, 2, 2, 16, 2, 2, num_classes=5).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    noise, found = torch.randn(1, 2, 4, 4), []
    for choice in choices:
        torch.manual_seed(0)
        found.append(SdeSampler("GVP", num_steps=4, **{option: choice})(net, torch.tensor([1]), noise))
        assert found[-1].isfinite().all()
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
    if option == "prediction":
        found = [OdeSampler("GVP", choice, num_steps=4)(net, torch.tensor([1]), noise) for choice in choices]
        assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


@pytest.mark.parametrize("module", ["families", "families.protocols"])
def test_no_torch(root, module):
    code = f"import sys, {module}; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def parts_of(protocol):
    """Names of the attributes and methods of a protocol."""
    return {*inspect.get_annotations(protocol), *(name for name in vars(protocol) if not name.startswith("_"))}


@pytest.mark.parametrize("name", ["DiT-T/2", "DiT-T-1-2", "SiT-T/2", "SiT-T-1-2", "MAR-T", "MAR-T-1-2"])
def test_network_protocol(name):
    config = {"input_size": 16, "in_channels": 3, "num_classes": 7}
    with torch.device("meta"):
        net = create_model(name, **config)
    assert {*config, "draw_drop", "blocks_to_compile"} <= parts_of(Network)
    assert not [part for part in parts_of(Network) if not hasattr(net, part)]
    assert {key: getattr(net, key) for key in config} == config
    assert {"drop", "mask", "observe"} <= inspect.signature(net.forward).parameters.keys()
    assert net.eval().draw_drop(5, "cpu") is None
    drop = net.train().draw_drop(5, "cpu")
    assert (drop.shape, drop.dtype) == ((5,), torch.bool)
    blocks = [block for stack in block_stacks(net) for block in stack]
    assert len(blocks) == sum(stack_layers(name))
    assert set(blocks) <= set(net.blocks_to_compile())


@pytest.mark.parametrize("name", NAMED)
def test_objective_protocol(name):
    objective = FAMILIES[name].make_objective(**FAMILIES[name].own_defaults("train"))
    assert not [part for part in parts_of(Objective) if not hasattr(objective, part)]
    assert not list(objective.parameters())
