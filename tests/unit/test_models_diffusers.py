"""Networks of diffusers as networks of ours: the same bits, gradients, gates, files; what becomes of every class.

docs/diffusers.md shows what is measured here; WRITE_DOCS=1 writes it there.
"""

import copy
import functools
import itertools
import os
import re
from dataclasses import dataclass

import diffusers
import pytest
import torch
from diffusers.models import transformers
from safetensors import safe_open
from torch.utils._pytree import tree_map

import models_diffusers
from engine.errors import InputError
from families.diffusers_stacks import cut_config, find_stacks, fixed_layers
from models_diffusers import PrunableNetwork, find_streams, first_output, make_network, save_network
from pruning.gates import block_stacks, decide
from pruning.surgery import keep_layers

reason = "tests/diffusers_classes.py is for a newer diffusers"
diffusers_classes = pytest.importorskip("diffusers_classes", reason=reason, exc_type=ImportError)
CLASSES, TEXT, build, run = (getattr(diffusers_classes, name) for name in ("CLASSES", "TEXT", "build", "run"))
pytestmark = pytest.mark.own_device

FIRST = ["PixArt", "SD3", "Flux", "Sana", "QwenImage"]
FIRST = [f"{name}Transformer2DModel" for name in FIRST] + ["WanTransformer3DModel"]
SD3, FLUX = FIRST[1:3]

SHARED = r"(\w+) and (\w+) have one depth, (\w+)"
NO_NUMBER = r"cannot be cut \(\w+: no number of its config says how deep it is"
MISFIT = r"cannot be cut \((\w+): the blocks that are left do not fit a shallower network, first [\w.]+"
PLACE = r"with layers \[[\d, ]+\] alone its output is not that of diffusers' network"
ROWS = r"a stream of tokens has (\d+) rows for 2 samples"
NO_NAMES = r"\w+ returns .*, which are not among its arguments"
NO_NETWORK = r"^is of the class \w+; diffusers [\w.]+ has no such transformer$"
TOLD = {  # kind of reason -> what the page says
    SHARED: "one number of its config is the depth of several lists",
    NO_NUMBER: "no number of its config can be made smaller alone",
    MISFIT: "which weights a block has depends on its place",
    PLACE: "what a block does depends on its place",
    ROWS: "the first size of its tokens is not the number of samples",
    NO_NAMES: "its blocks do not return their arguments under the same names",
    NO_NETWORK: "it is only a part of networks and has no config",
}
REFUSED = {  # all others work
    "AceStepTransformer1DModel": PLACE,
    "BriaFiboTransformer2DModel": SHARED,
    "ChromaTransformer2DModel": PLACE,
    "ConsisIDTransformer3DModel": SHARED,
    "Cosmos3OmniTransformer": NO_NAMES,
    "DiTTransformer2DModel": PLACE,
    "DualTransformer2DModel": NO_NETWORK,
    "ErnieImageTransformer2DModel": ROWS,
    "HiDreamImageTransformer2DModel": SHARED,
    "HunyuanDiT2DModel": MISFIT,
    "LatteTransformer3DModel": SHARED,
    "MotifVideoTransformer3DModel": PLACE,
    "NucleusMoEImageTransformer2DModel": MISFIT,
    "RFD4ProteinaTransformer": MISFIT,
    "SanaWMTransformer3DModel": MISFIT,
    "TransformerTemporalModel": ROWS,
    "WanAnimateTransformer3DModel": SHARED,
    "WanVACETransformer3DModel": NO_NUMBER,
}
WORKING = [name for name in CLASSES if name not in REFUSED]


def config_of(plain):
    """The whole config of a network of diffusers, as its file has it."""
    config = getattr(plain, "config", {})
    return {key: value for key, value in config.items() if not key.startswith("_")}


def make(name, groups=None):
    """(diffusers' tiny network, ours with the same weights, its config)."""
    plain = build(name)
    config = config_of(plain)
    net = make_network(name, config, groups)
    net.load_state_dict({**net.state_dict(), **plain.state_dict()})
    return plain, net.eval(), config


def prepared(name, groups=None):
    plain, net, config = make(name, groups)
    net.prepare(CLASSES[name].inputs)
    return plain, net, config


def depth_of(net):
    return sum(stack.depth for stack in net.stacks)


def mask_of(net, *kept):
    """A row of the mask for each of these lists of layers."""
    mask = torch.zeros(len(kept), depth_of(net))
    for row, layers in zip(mask, kept, strict=True):
        row[list(layers)] = 1.0
    return mask


def cut_of(plain, net, config, kept):
    """Diffusers' own network with the layers `kept` alone, whose weights fit strictly."""
    cut = type(plain).from_config(cut_config(config, net.stacks, kept))
    names = tuple(stack.name for stack in net.stacks)
    cut.load_state_dict(keep_layers(plain.state_dict(), kept, names), strict=True)
    return cut.eval()


def set_dense(net, dense, checkpointing=False):
    for stack in block_stacks(net):
        stack.dense, stack.checkpointing = dense, checkpointing


def halves(net):
    """Two lists of layers of which every stack keeps some: every second one, and the others."""
    fixed = fixed_layers(net.stacks)
    return [sorted({*range(start, depth_of(net), 2), *fixed}) for start in (0, 1)]


def draw_masks(net, n, seed=0):
    """Masks that differ between samples and skip something in each."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(n, depth_of(net), generator=generator) > 0.5).float()
    mask[:, 0], mask[0, 1] = torch.arange(n) % 2, 0.0
    mask[:, fixed_layers(net.stacks)] = 1.0
    return mask


def double(inputs):
    return tree_map(lambda x: x.double() if torch.is_tensor(x) and x.is_floating_point() else x, inputs)


def largest(x):
    return x.abs().max().item()


@pytest.mark.parametrize("name", FIRST)
def test_keys_are_those_of_diffusers(name):
    plain, net, config = make(name)
    assert list(net.state_dict()) == list(plain.state_dict())
    depth = depth_of(net)
    gated = make_network(name, config, groups=[(1, 2)] * (depth // 2))
    assert set(gated.state_dict()) - set(plain.state_dict()) == {f"gumbel_gates.{g}" for g in range(depth // 2)}
    assert isinstance(net, type(plain))
    assert type(net).__name__ == name


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("name", FIRST)
@torch.no_grad()
def test_outputs_are_the_same_bits(name, dense):
    """Of the plain network with all layers, and of cut networks with some; without a mask as diffusers calls it."""
    plain, net, config = prepared(name)
    set_dense(net, dense)
    inputs = CLASSES[name].inputs(3)
    expected = run(plain, inputs)
    assert torch.equal(run(net, inputs), expected)
    assert torch.equal(first_output(net, inputs, mask=torch.ones(3, depth_of(net))), expected)
    for kept in halves(net):
        goal = run(cut_of(plain, net, config, kept), inputs)
        assert largest(goal - expected) > 1e-3 * largest(expected)
        assert torch.equal(first_output(net, inputs, mask=mask_of(net, kept).expand(3, -1)), goal)
        assert torch.equal(first_output(net, inputs, kept=kept), goal)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("name", FIRST)
@torch.no_grad()
def test_every_sample_has_its_own_mask(name, dense):
    """A sample of a batch gets what it gets alone, and what a batch gets of which all have its mask."""
    _, net, _ = prepared(name)
    set_dense(net, dense)
    make_inputs, mask = CLASSES[name].inputs, draw_masks(net, 3)
    out = first_output(net, make_inputs(3), mask=mask)
    limit = 1e-5 * largest(out)
    assert largest(out[:1] - first_output(net, make_inputs(1), mask=mask[:1])) < limit
    for i in range(3):
        same = first_output(net, make_inputs(3), mask=mask[i].expand(3, -1))
        assert largest(out[i] - same[i]) < limit
        assert largest(out - same) > 10 * limit


def test_sparse_form_runs_a_block_for_kept_samples_only():
    _, net, _ = prepared(FLUX)
    rows = []
    net.transformer_blocks[1].norm1.register_forward_hook(lambda module, given, out: rows.append(len(given[0])))
    mask = torch.ones(3, depth_of(net))
    mask[[0, 2], 1] = 0.0
    for dense in (False, True):
        set_dense(net, dense)
        first_output(net, CLASSES[FLUX].inputs(3), mask=mask)
    assert rows == [1, 3]


def gated(name):
    """A gated network of float64 in training mode."""
    depth = sum(stack.depth for stack in find_stacks(name, config_of(build(name))))
    return prepared(name, [(1, 2)] * (depth // 2))[1].double().train()


def gradients(net, name, dense, checkpointing=False):
    """Output and all gradients of one pass with the same draws."""
    set_dense(net, dense, checkpointing)
    net.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    with pytest.MonkeyPatch.context() as patch:  # some networks compute a part in float32, whose rounding would show
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        out = first_output(net, double(CLASSES[name].inputs(3)))
        out.square().sum().backward()
    return out.detach(), {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in net.named_parameters()}


@pytest.mark.parametrize("name", FIRST)
def test_gradients_equal_the_dense_form(name):
    """Of all weights and of the gates, which learn through the mask alone."""
    net = gated(name)
    (out, expected), (sparse, got) = gradients(net, name, dense=True), gradients(net, name, dense=False)
    assert largest(sparse - out) <= 1e-10 * largest(out)
    tables = [net.gumbel_gates.get_buffer(f"candidates_{g}") for g in range(len(net.gumbel_gates))]
    learn = [largest(expected[f"gumbel_gates.{g}"]) > 0 for g, table in enumerate(tables) if len(table) > 1]
    assert learn
    assert all(learn)
    for key, value in expected.items():
        assert largest(got[key] - value) <= 1e-10 * largest(value), key


@pytest.mark.parametrize("name", FIRST)
def test_checkpointing_gives_the_same_gradients(name):
    """And runs the blocks again in the backward."""
    net, calls = gated(name), []
    module = next(each for each in net.blocks_to_compile()[0].modules() if isinstance(each, torch.nn.Linear))
    module.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    (out, expected), once = gradients(net, name, dense=True), calls.count(True)
    (again, got), twice = gradients(net, name, dense=True, checkpointing=True), calls.count(True) - once
    assert once > 0
    assert twice == 2 * once
    assert torch.equal(again, out)
    for key, value in expected.items():
        assert largest(got[key] - value) <= 1e-10 * largest(value), key
    sparse = gradients(net, name, dense=False)
    recomputed = gradients(net, name, dense=False, checkpointing=True)
    assert torch.equal(recomputed[0], sparse[0])
    for key, value in sparse[1].items():
        assert largest(recomputed[1][key] - value) <= 1e-10 * largest(value), key


def record_blocks(plain, names, change=None):
    """[(output of a block)] that fills when diffusers' own network runs; change: layer -> whether it is halved."""
    seen = []

    def hook(module, given, out):
        seen.append(out)
        if change is not None and len(seen) - 1 == change:
            halved = tuple(each if each is None else each / 2 for each in as_tuple(out))
            return halved if isinstance(out, tuple) else halved[0]
        return None

    for name in names:
        for block in getattr(plain, name):
            block.register_forward_hook(hook)
    return seen


def as_tuple(tokens):
    return tokens if isinstance(tokens, tuple) else (tokens,)


@pytest.mark.parametrize("name", FIRST)
@torch.no_grad()
def test_observers_see_what_blocks_return(name):
    """In every layer, also the last one of SD3, which returns no text and shows the image alone."""
    plain, net, _ = prepared(name)
    inputs, seen = CLASSES[name].inputs(2), []
    blocks = record_blocks(plain, [stack.name for stack in net.stacks])
    out = first_output(net, inputs, observe=lambda *told: seen.append(told))
    assert torch.equal(out, run(plain, inputs))
    assert [layer for layer, _, _ in seen] == list(range(depth_of(net)))
    live = [[place for place, each in enumerate(as_tuple(streams)) if each is not None] for streams in blocks]
    ends = [layer for layer, places in enumerate(live) if len(places) < len(as_tuple(blocks[layer]))]
    assert ends == ([3] if name == SD3 else [])
    for layer, before, after in seen:
        expected = [as_tuple(blocks[layer])[place] for place in live[layer]]
        assert isinstance(after, tuple) == isinstance(before, tuple) == (len(expected) > 1)
        assert all(map(torch.equal, as_tuple(after), expected))
        if layer and len(as_tuple(blocks[layer - 1])) == len(as_tuple(blocks[layer])):
            given = [as_tuple(blocks[layer - 1])[place] for place in live[layer]]
            assert len(given) == len(as_tuple(before))
            assert all(map(torch.equal, as_tuple(before), given))


@pytest.mark.parametrize("name", FIRST)
@torch.no_grad()
def test_observers_see_skipped_samples_unchanged(name):
    _, net, _ = prepared(name)
    mask, told = torch.ones(2, depth_of(net)), {}
    mask[0, 1] = 0.0
    first_output(net, CLASSES[name].inputs(2), mask=mask, observe=lambda layer, *streams: told.update({layer: streams}))
    for before, after in zip(*map(as_tuple, told[1]), strict=True):
        assert torch.equal(before[0], after[0])
        assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("name", FIRST)
@torch.no_grad()
def test_observers_replace(name):
    """What a block returns; of the last one, which of SD3 ends a stream, too."""
    inputs = CLASSES[name].inputs(2)
    for changed in (1, depth_of(prepared(name)[1]) - 1):
        plain, net, _ = prepared(name)
        before = run(plain, inputs)

        def halve(layer, _, after, changed=changed):
            if layer != changed:
                return None
            return tuple(each / 2 for each in after) if isinstance(after, tuple) else after / 2

        record_blocks(plain, [stack.name for stack in net.stacks], change=changed)
        expected = run(plain, inputs)
        assert not torch.equal(before, expected)
        assert torch.equal(first_output(net, inputs, observe=halve), expected)


@pytest.mark.parametrize("name", FIRST)
@torch.no_grad()
def test_copies_are_independent(name):
    _, net, _ = prepared(name)
    inputs, mask = CLASSES[name].inputs(3), draw_masks(net, 3)
    whole, masked = first_output(net, inputs), first_output(net, inputs, mask=mask)
    other = copy.deepcopy(net)
    assert torch.equal(first_output(other, inputs, mask=mask), masked)
    for p in other.blocks_to_compile()[1].parameters():
        p.mul_(1.5)
    assert torch.equal(first_output(net, inputs), whole)
    assert torch.equal(first_output(net, inputs, mask=mask), masked)
    assert not torch.equal(first_output(other, inputs), whole)
    assert not torch.equal(first_output(other, inputs, mask=mask), masked)
    for stack in block_stacks(other):
        assert all(block.forward.block is block and block.forward.stack is stack for block in stack)


def test_gates_of_sd3_keep_the_last_block():
    _, net, _ = make(SD3, [(1, 2)] * 2)
    assert fixed_layers(net.stacks) == [3]
    assert net.gumbel_gates.get_buffer("candidates_0").tolist() == [[1, 0], [0, 1]]
    assert net.gumbel_gates.get_buffer("candidates_1").tolist() == [[0, 1]]
    drawn = net.gumbel_gates.draw(64)
    assert drawn[:, 3].eq(1).all()
    assert set(drawn.sum(0).tolist()[:2]) != {0.0, 64.0}


@pytest.mark.parametrize("best", [0, 1])
@pytest.mark.parametrize("name", FIRST)
@torch.no_grad()
def test_gated_network_is_the_cut_one_in_eval_mode(name, best):
    depth = sum(stack.depth for stack in find_stacks(name, config_of(build(name))))
    plain, net, config = make(name, [(1, 2)] * (depth // 2))
    for logits in net.gumbel_gates:
        logits[0, min(best, logits.shape[1] - 1)] = 1.0
    kept, inputs = decide(net).kept, CLASSES[name].inputs(2)
    assert kept == [3 if name == SD3 and layer == 2 else layer + best for layer in range(0, depth, 2)]
    assert torch.equal(run(net, inputs), run(cut_of(plain, net, config, kept), inputs))


@pytest.mark.parametrize("name", FIRST)
def test_gated_network_can_be_prepared(name):
    """Before and after it has learnt what to drop, in either mode, which it keeps."""
    for best in (0, 1):
        _, net, _ = make(
            name, [(1, 2)] * (sum(stack.depth for stack in find_stacks(name, config_of(build(name)))) // 2)
        )
        with torch.no_grad():
            for logits in net.gumbel_gates:
                logits[0, min(best, logits.shape[1] - 1)] = 1.0
        net.train()
        net.prepare(CLASSES[name].inputs)
        assert net.training
        assert all(block.forward.rows is not None for block in net.blocks_to_compile())


def written_dtypes(folder):
    """Types of the tensors in the files of a folder."""
    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("name", FIRST)
@torch.no_grad()
def test_saved_folders_are_opened_by_diffusers(tmp_path, monkeypatch, name):
    """As the same class with the same bits; also in place of an earlier folder, of which nothing stays."""
    plain, net, config = make(name)
    monkeypatch.setattr(type(plain), "_keep_in_fp32_modules", None)  # without which opening them needs no accelerate
    folder, names, inputs = tmp_path / "pruned", tuple(stack.name for stack in net.stacks), CLASSES[name].inputs(2)
    for kept in halves(net):
        save_network(folder, name, config, keep_layers(plain.state_dict(), kept, names), kept)
        opened = type(plain).from_pretrained(folder, low_cpu_mem_usage=False).eval()
        assert type(opened) is type(plain)
        assert torch.equal(run(opened, inputs), run(cut_of(plain, net, config, kept), inputs))
        assert written_dtypes(folder) == {torch.float32}
        assert list(tmp_path.iterdir()) == [folder]
        assert not (folder / "stale").exists()
        (folder / "stale").touch()


@pytest.mark.parametrize("name", FIRST)
def test_saved_weights_keep_their_precision(tmp_path, name):
    plain, net, config = make(name)
    kept = halves(net)[0]
    state = keep_layers(plain.bfloat16().state_dict(), kept, tuple(stack.name for stack in net.stacks))
    save_network(tmp_path / "pruned", name, config, state, kept)
    assert written_dtypes(tmp_path / "pruned") == {torch.bfloat16}


def test_weights_that_do_not_fit_are_not_saved(tmp_path):
    """And what was there stays."""
    plain, net, config = make(FLUX)
    state = keep_layers(plain.state_dict(), [0, 4], tuple(stack.name for stack in net.stacks))
    save_network(tmp_path / "pruned", FLUX, config, state, [0, 4])
    before = {path.name: path.read_bytes() for path in (tmp_path / "pruned").iterdir()}
    with pytest.raises(ValueError, match="the weights do not make a FluxTransformer2DModel"):
        save_network(tmp_path / "pruned", FLUX, config, state, [0, 1, 4])
    assert {path.name: path.read_bytes() for path in (tmp_path / "pruned").iterdir()} == before
    assert len(list(tmp_path.iterdir())) == 1


BOTH = ("encoder_hidden_states", "hidden_states")


@pytest.mark.parametrize(
    ("name", "stack", "forms"),
    [
        (FLUX, "transformer_blocks", [(BOTH, True)]),
        (FLUX, "single_transformer_blocks", [(BOTH, True)]),
        (SD3, "transformer_blocks", [(BOTH, True)]),
        ("MochiTransformer3DModel", "transformer_blocks", [(BOTH[::-1], True)]),
        ("CogVideoXTransformer3DModel", "transformer_blocks", [(BOTH[::-1], True)]),
        ("Flux2Transformer2DModel", "single_transformer_blocks", [(BOTH, True), (BOTH[1:], False)]),
        ("WanTransformer3DModel", "blocks", [(BOTH[1:], False)]),
        ("T5FilmDecoder", "decoders", [(BOTH[1:], True)]),
    ],
)
def test_streams(name, stack, forms):
    """Their names, and whether they come in a tuple: also where it is one stream."""
    assert find_streams(type(getattr(build(name), stack)[0])) == forms


@torch.no_grad()
def test_observed_streams_are_in_the_blocks_order():
    """Text before the image or after it; the single blocks of Flux 2 have both in one stream."""
    sizes = {}
    for name in (FLUX, "MochiTransformer3DModel", "Flux2Transformer2DModel"):
        _, net, _ = prepared(name)
        sizes[name] = seen = {}
        first_output(
            net,
            CLASSES[name].inputs(2),
            observe=lambda layer, before, after, seen=seen: seen.update({layer: [x.shape[1] for x in as_tuple(after)]}),
        )
    assert set(map(tuple, sizes[FLUX].values())) == {(TEXT, 16)}
    assert set(map(tuple, sizes["MochiTransformer3DModel"].values())) == {(32, TEXT)}
    assert [sizes["Flux2Transformer2DModel"][layer] for layer in (3, 4)] == [[16, TEXT][::-1], [TEXT + 16]]


def test_config_of_cut_network():
    config = config_of(build(SD3))
    stacks = find_stacks(SD3, config)
    for kept, expected in {(0, 2, 3): [0], (1, 3): [0], (0, 1, 3): [0, 1], (2, 3): []}.items():
        cut = cut_config(config, stacks, list(kept))
        assert cut["dual_attention_layers"] == expected
        assert cut["num_layers"] == len(kept)
        same = {"dual_attention_layers", "num_layers"}
        assert {key: cut[key] for key in cut if key not in same} == {k: v for k, v in config.items() if k not in same}
    assert list(config["dual_attention_layers"]) == [0, 1]


@pytest.mark.parametrize(("kept", "depths"), [([1, 5, 6, 7], (1, 3)), ([0, 1, 3, 4], (3, 1)), ([2, 3, 6], (2, 1))])
@torch.no_grad()
def test_two_stacks_are_cut_unevenly(kept, depths):
    plain, net, config = prepared(FLUX)
    cut, inputs = cut_of(plain, net, config, kept), CLASSES[FLUX].inputs(2)
    assert (cut.config.num_layers, cut.config.num_single_layers) == depths
    assert torch.equal(first_output(net, inputs, mask=mask_of(net, kept, kept)), run(cut, inputs))


@dataclass(frozen=True)
class Found:
    """What becomes of a class. net: prepared, of ours; reason: why it is refused."""

    stacks: tuple = ()
    net: PrunableNetwork | None = None
    reason: str = ""


@functools.cache
def measure(name):
    """Found of a class; at most once for all tests. Only a ValueError is a refusal."""
    plain, stacks = build(name), ()
    config = config_of(plain)
    try:
        stacks = find_stacks(name, config)
        net = make_network(name, config).eval()
        net.load_state_dict(plain.state_dict())
        net.prepare(CLASSES[name].inputs)
    except ValueError as error:
        return Found(stacks, reason=str(error))
    return Found(stacks, net)


@pytest.mark.parametrize("name", CLASSES)
def test_class_works_or_says_why_not(name):
    found = measure(name)
    if name in REFUSED:
        assert re.search(REFUSED[name], found.reason)
    else:
        assert not found.reason


def test_list_of_compared_classes(root):
    """The classes that are cut without data to compare a network on are those that are compared here."""
    listed = (root / "families" / "diffusers_classes.txt").read_text().split()
    assert listed == sorted(WORKING)
    assert {name for name in CLASSES if measure(name).net is not None} == set(listed)


@pytest.mark.parametrize("name", WORKING)
@torch.no_grad()
def test_class_that_works(name):
    """Bits of the plain and of cut networks, also of one without the first layer; every sample its own mask."""
    net, plain = measure(name).net, build(name)
    assert net is not None, measure(name).reason
    config, make_inputs = config_of(plain), CLASSES[name].inputs
    whole = run(plain, make_inputs(3))
    scale = largest(whole)
    mask = draw_masks(net, 3)
    for kept in halves(net):
        goal = run(cut_of(plain, net, config, kept), make_inputs(3))
        for dense in (False, True):
            set_dense(net, dense)
            assert torch.equal(first_output(net, make_inputs(3), mask=mask_of(net, kept).expand(3, -1)), goal), kept
    for dense in (True, False):
        set_dense(net, dense)
        assert torch.equal(first_output(net, make_inputs(3), mask=torch.ones_like(mask)), whole)
        out = first_output(net, make_inputs(3), mask=mask)
        for i in range(3):
            same = first_output(net, make_inputs(3), mask=mask[i].expand(3, -1))
            assert largest(out[i] - same[i]) < 1e-4 * scale


def of_kind(kind):
    return [name for name, reason in REFUSED.items() if reason == kind]


def lists_of(net):
    return {name: len(each) for name, each in net.named_children() if isinstance(each, torch.nn.ModuleList)}


@pytest.mark.parametrize("name", of_kind(SHARED))
def test_refused_lists_have_one_depth(name):
    """A network of diffusers whose number is one less has one less in both lists."""
    plain = build(name)
    told = re.findall(SHARED, measure(name).reason)
    assert told
    for one, two, field in told:
        smaller = type(plain).from_config({**config_of(plain), field: plain.config[field] - 1})
        before, after = lists_of(plain), lists_of(smaller)
        assert [before[each] - after[each] for each in (one, two)] == [1, 1]


@pytest.mark.parametrize("name", of_kind(NO_NUMBER))
def test_refused_networks_have_no_number(name):
    """Diffusers makes no network with one block less by a smaller number alone."""
    plain = build(name)
    config = config_of(plain)
    fields = [field for field, value in config.items() if type(value) is int and "layers" in field]
    assert fields
    for field in fields:
        with pytest.raises(ValueError, match="layers"):
            type(plain).from_config({**config, field: config[field] - 1})


@pytest.mark.parametrize("name", of_kind(MISFIT))
def test_refused_weights_do_not_fit(name):
    """Of the weights that some choices of blocks leave, a smaller network of diffusers does not take all."""
    plain = build(name)
    stack = re.search(MISFIT, measure(name).reason)[1]
    field = "nlayers" if "nlayers" in plain.config else "num_layers"
    blocks, misfits = len(getattr(plain, stack)), []
    for depth in (blocks - 1, blocks // 2):
        smaller = type(plain).from_config({**config_of(plain), field: depth})
        assert len(getattr(smaller, stack)) == depth
        expected = {key: value.shape for key, value in smaller.state_dict().items()}
        for kept in itertools.combinations(range(blocks), depth):
            left = keep_layers(plain.state_dict(), kept, (stack,))
            misfits += [kept] * ({key: value.shape for key, value in left.items()} != expected)
    assert misfits


@pytest.mark.parametrize("name", of_kind(PLACE))
@torch.no_grad()
def test_refused_blocks_depend_on_their_place(name):
    """A network without some blocks is far from the one that diffusers makes of the others: more than rounding."""
    plain, net, config = make(name)
    inputs, far = CLASSES[name].inputs(2), []
    for kept in halves(net):
        goal = run(cut_of(plain, net, config, kept), inputs)
        gap = largest(first_output(net, inputs, mask=mask_of(net, kept, kept)) - goal) / largest(goal)
        far += [kept] * (gap > 1e-2)
        assert gap > 1e-2 or gap == 0
    assert str(far[0]) in measure(name).reason  # of DiT, which reads its first block after the last, not the first cut
    assert len(far) == (1 if name == "DiTTransformer2DModel" else 2)


def block_streams(plain, stack, inputs):
    """(tensors that the first block of a network is given, what it returns)."""
    seen = []
    block = getattr(plain, stack)[0]
    block.register_forward_hook(
        lambda _, given, named, out: seen.append(([*given, *named.values()], out)), with_kwargs=True
    )
    run(plain, inputs)
    return seen[0]


@pytest.mark.parametrize("name", of_kind(ROWS))
@torch.no_grad()
def test_refused_tokens_have_other_rows(name):
    """Tokens of two samples have other rows than two, where a block of diffusers is given them."""
    found = measure(name)
    given, _ = block_streams(build(name), found.stacks[0].name, CLASSES[name].inputs(2))
    assert len(given[0]) == int(re.search(ROWS, found.reason)[1])
    assert len(given[0]) != 2


@pytest.mark.parametrize("name", of_kind(NO_NAMES))
@torch.no_grad()
def test_refused_streams_have_no_names(name):
    """And no row for every sample."""
    found = measure(name)
    _, out = block_streams(build(name), found.stacks[0].name, CLASSES[name].inputs(2))
    assert [len(each) for each in out] == [TEXT, 8]


@pytest.mark.parametrize("name", of_kind(NO_NETWORK))
def test_refused_parts_are_no_networks(name):
    network = getattr(transformers, name)
    assert not issubclass(network, diffusers.ModelMixin)
    assert not hasattr(network, "from_config")


def with_long_text(n):
    """Inputs of Flux with as many tokens of text as of the image, so that no shape tells them apart."""
    inputs = CLASSES[FLUX].inputs(n)
    text = inputs["encoder_hidden_states"].repeat(1, 4, 1)[:, :16]
    return {**inputs, "encoder_hidden_states": text, "txt_ids": torch.zeros(16, 3)}


def test_streams_in_the_wrong_order_are_found(monkeypatch):
    _, net, _ = make(FLUX)
    net.prepare(with_long_text)
    _, net, _ = make(FLUX)
    turned = [(names[::-1], True) for names, _ in find_streams(type(net.transformer_blocks[0]))]
    monkeypatch.setattr(models_diffusers, "find_streams", lambda block: turned)
    with pytest.raises(ValueError, match="its output is not that of diffusers' network"):
        net.prepare(with_long_text)
    assert not net.prepared


def know_their_place(monkeypatch, scale):
    """Let the blocks of a PixArt multiply what they return by a function of their number."""
    network = transformers.PixArtTransformer2DModel
    block = type(build(FIRST[0]).transformer_blocks[0])
    initialize, forward = network.__init__, block.forward

    @functools.wraps(initialize)
    def numbered(self, *given, **named):
        initialize(self, *given, **named)
        for place, each in enumerate(self.transformer_blocks):
            each.place = place

    @functools.wraps(forward)
    def scaled(self, *given, **named):
        return forward(self, *given, **named) * scale(self.place)

    monkeypatch.setattr(network, "__init__", numbered)
    monkeypatch.setattr(block, "forward", scaled)


@pytest.mark.parametrize(
    ("scale", "found"),
    [
        (lambda place: 1.0, ""),
        (lambda place: 1 + place * 0.01, "with layers [0, 2] alone"),  # the later the more
        (lambda place: 1.01 if place == 0 else 1.0, "with layers [1, 3] alone"),  # right wherever the first stays
    ],
    ids=["nowhere", "later", "first"],
)
def test_blocks_that_know_their_place_are_found(monkeypatch, scale, found):
    """By one of two cuts, each of which leaves out what the other keeps."""
    know_their_place(monkeypatch, scale)
    _, net, _ = make(FIRST[0])
    if not found:
        net.prepare(CLASSES[FIRST[0]].inputs)
        return
    with pytest.raises(InputError, match=re.escape(found)):
        net.prepare(CLASSES[FIRST[0]].inputs)
    assert not net.prepared


def test_what_torch_says_is_a_refusal(monkeypatch):
    """Inputs that do not fit, as they are recorded for another network: in one line, with the model's class."""
    _, net, _ = make(FLUX)
    with pytest.raises(
        InputError, match=r"^--model: no layer of this FluxTransformer2DModel can be left out \(.*shapes"
    ):
        net.prepare(lambda n: {**CLASSES[FLUX].inputs(n), "hidden_states": torch.zeros(n, 16, 5)})
    assert not net.prepared


def full_masks(inputs):
    """The same inputs with masks that leave no token out, for which some networks give their blocks none."""
    return {key: torch.ones_like(value) if "mask" in key else value for key, value in inputs.items()}


def no_masks(inputs):
    return {key: None if "mask" in key else value for key, value in inputs.items()}


OTHER_CALLS = [
    ("PixArtTransformer2DModel", no_masks),
    ("SanaTransformer2DModel", no_masks),
    ("QwenImageTransformer2DModel", no_masks),
    ("Lumina2Transformer2DModel", full_masks),
]


@pytest.mark.parametrize("learnt_without", [False, True])
@pytest.mark.parametrize(("name", "without"), OTHER_CALLS)
@torch.no_grad()
def test_other_arguments_than_were_learnt(monkeypatch, name, without, learnt_without):
    """A mask of text that blocks do not get, or get though they were prepared without: every sample has its numbers.

    Skipped samples are left out where the arguments are those that were learnt, else all run.
    """
    plain, net, config = make(name)
    forms = [CLASSES[name].inputs, lambda n: without(CLASSES[name].inputs(n))]
    learnt, other = forms[::-1] if learnt_without else forms
    net.prepare(learnt)
    rows, call = [], models_diffusers.Routed.call

    def counted(self, given, names, streams, plain=False):
        rows.append(len(streams[0]))
        return call(self, given, names, streams, plain)

    monkeypatch.setattr(models_diffusers.Routed, "call", counted)
    choices = [[0, 2], [1, 2, 3], [0, 1, 3]]
    for make_inputs, expected_rows in ((learnt, [2, 2, 2, 2]), (other, [3, 3, 3, 3])):
        inputs = make_inputs(3)
        rows.clear()
        out = first_output(net, inputs, mask=mask_of(net, *choices))
        assert rows == expected_rows
        for i, kept in enumerate(choices):
            expected = run(cut_of(plain, net, config, kept), inputs)
            assert largest(out[i] - expected[i]) < 1e-5 * largest(expected[i])
            assert largest(out[i] - run(plain, inputs)[i]) > 1e-3 * largest(expected[i])


START, END = "<!-- measured: see tests/unit/test_models_diffusers.py -->\n", "<!-- end of what is measured -->\n"


def tell(name):
    """A class's row of the table."""
    found = measure(name)
    stacks = ", ".join(f"`{stack.name}` (`{stack.field}`)" for stack in found.stacks) or "-"
    if found.net is None:
        told = TOLD[REFUSED[name]] if re.search(REFUSED.get(name, "$^"), found.reason) else found.reason
        return f"| `{name}` | {stacks} | refused: {told} |"
    words = ["works"]
    words += ["last block stays"] * any(stack.keeps_last for stack in found.stacks)
    some = any(block.forward.rows is None for block in found.net.blocks_to_compile())
    words += ["all samples run (no skipping)"] * some
    whole = lists_of(found.net).keys() - {stack.name for stack in found.stacks}
    words += [f"`{name}` stays whole" for name in sorted(whole) if len(getattr(found.net, name)) > 1]
    return f"| `{name}` | {stacks} | {', '.join(words)} |"


def tell_classes():
    """What the page says between its two marks."""
    rows = [tell(name) for name in CLASSES]
    work = sum("| works" in row for row in rows)
    said = f"Measured with diffusers {diffusers.__version__}: {work} of {len(rows)} classes work, "
    said += f"{len(rows) - work} are refused."
    return "\n".join([said, "", "| class | stacks (number in the config) | result |", "|---|---|---|", *rows, ""])


def test_page_shows_what_is_measured(root):
    """WRITE_DOCS=1 writes the table; with another version of diffusers there is nothing to compare."""
    page = root / "docs" / "diffusers.md"
    before, _, rest = page.read_text().partition(START)
    shown, _, after = rest.partition(END)
    if os.environ.get("WRITE_DOCS") == "1":
        page.write_text(before + START + tell_classes() + END + after)
        return
    version = re.search(r"Measured with diffusers ([\w.]+):", shown)[1]
    if version != diffusers.__version__:
        pytest.skip(f"the page is about diffusers {version}, and {diffusers.__version__} is installed")
    assert shown == tell_classes(), "WRITE_DOCS=1 python -m pytest tests/unit/test_models_diffusers.py rewrites it"


def test_compiled_blocks_are_compared_as_they_are():
    """Compiled ones round otherwise; they are taken again afterwards."""
    net, calls = make_network(FIRST[0], CLASSES[FIRST[0]].config), []
    net.load_state_dict(build(FIRST[0]).state_dict())

    def rounded(block, *inputs, **options):
        calls.append(block)
        return type(block).forward(block, *inputs, **options) * (1 + 1e-6)

    for block in net.blocks_to_compile():
        block.forward.compiled = rounded
    net.prepare(CLASSES[FIRST[0]].inputs)
    assert not calls
    first_output(net.eval(), CLASSES[FIRST[0]].inputs(2))
    assert calls == net.blocks_to_compile()
