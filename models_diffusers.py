"""Any transformer of diffusers as a network of ours: its blocks become stacks that masks, gates and observers act on.

Nothing of the class is rewritten. A network is an object of diffusers' own class with its own parameter names; every
block's `forward` is replaced, in that object, by a `Routed` that may leave the block out, sample by sample. How many
blocks a stack has, which number of the config says so, and which streams of tokens a block passes on are found by
asking the class, not from a list of classes; what does not add up is refused with the reason.
"""

import ast
import inspect
import tempfile
import textwrap
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from engine.errors import InputError
from families.diffusers_stacks import build_class, cut_config, find_stacks, fixed_layers, list_arguments
from families.hollow import parameters_on_meta
from pruning.gates import BlockStack, LayerGates, choose_layers
from pruning.lora import adapters_off, is_adapter
from pruning.routing import Routes, take
from pruning.surgery import keep_layers

# Classes whose cut networks were compared with whole ones (docs/diffusers.md). Others are, where there are data:
# blocks may fit a shallower network, and do something else in it.
COMPARED = set((Path(__file__).parent / "families" / "diffusers_classes.txt").read_text().split())


NEAR = 1e-2  # of the norm


@cache
def find_streams(block_class):
    """The forms of what a block returns, the longest first: names of its streams of tokens, and whether in a tuple.

    A block returns arguments that it has changed, under their own names: `return encoder_hidden_states, hidden_states`.
    Where a single value has another name it is the first argument. Raises ValueError for anything else.
    """
    forward = inspect.unwrap(block_class.forward)
    names = list(inspect.signature(forward).parameters)[1:]
    tree, forms = ast.parse(textwrap.dedent(inspect.getsource(forward))), set()
    for statement in (node for node in ast.walk(tree) if isinstance(node, ast.Return)):
        value = statement.value
        values = value.elts if isinstance(value, ast.Tuple) else [value]
        form = tuple(each.id if isinstance(each, ast.Name) else None for each in values)
        form = form if set(form) <= set(names) else (names[0],) if len(form) == 1 else form
        forms.add((form, isinstance(value, ast.Tuple)))
    known = [each for each in forms if set(each[0]) <= set(names) and len(set(each[0])) == len(each[0])]
    if not known:
        raise ValueError(f"{block_class.__name__} returns {forms}, which are not among its arguments {names}")
    return sorted(known, key=lambda each: len(each[0]), reverse=True)


@cache
def signature_of(block_class):
    return inspect.signature(inspect.unwrap(block_class.forward))


@dataclass
class Passing:
    """One forward pass of a network: what is done to its blocks. record: {layer: leaves of its arguments} to fill."""

    mask: torch.Tensor | None = None
    routes: Routes | None = None
    kept: list | None = None
    observe: object = None
    record: dict | None = None


class Routed:
    """Stands where the forward of one block does.

    layer: its number through all stacks. fixed: it always runs. rows: which leaves of its arguments have a row for
    every sample (None for a leaf that is no tensor), known after `PrunableNetwork.prepare`; where they are not known,
    or other arguments are given than then, all samples run.
    """

    def __init__(self, stack, layer, block, fixed):
        self.stack, self.layer, self.block, self.fixed = stack, layer, block, fixed
        self.rows, self.compiled = None, None

    def __call__(self, *inputs, **options):
        passing = self.stack.passing
        if passing is None:
            return self.run(*inputs, **options)
        bound = signature_of(type(self.block)).bind(self.block, *inputs, **options)
        given = dict(list(bound.arguments.items())[1:])
        names, as_tuple = self.choose_form(given)
        if passing.record is not None:
            passing.record[self.layer] = flatten_others(given, names)[0]
        before = [given[name] for name in names]
        if passing.mask is not None and (wrong := [len(x) for x in before if len(x) != len(passing.mask)]):
            raise ValueError(f"a stream of tokens has {wrong[0]} rows for {len(passing.mask)} samples")
        if passing.kept is not None and self.layer not in passing.kept:
            return tuple(before) if as_tuple else before[0]
        if passing.mask is None or self.fixed:
            after = self.call(given, names, before)
        elif passing.routes and (call := self.make_call(given, names, len(passing.mask))):
            after = passing.routes.route(self.layer, before, self.block, call, self.stack.together)
        else:
            after = blend(before, self.call(given, names, before), passing.mask[:, self.layer])
        if passing.observe is not None:
            after = show(passing.observe, self.layer, before, after)
        return tuple(after) if as_tuple else after[0]

    def choose_form(self, given):
        """What this call returns, see find_streams: the longest form whose streams are all there."""
        forms = find_streams(type(self.block))
        return next((f for f in forms if all(torch.is_tensor(given.get(name)) for name in f[0])), forms[-1])

    def call(self, given, names, streams, plain=False):
        """The block's streams, of its arguments with these streams; plain: without recomputing in the backward."""
        given = {**given, **dict(zip(names, streams, strict=True))}
        out = (self.run_plain if plain else self.run)(**given)
        out = list(out) if isinstance(out, tuple | list) else [out]
        if len(out) != len(names):
            raise ValueError(f"{type(self.block).__name__} returns {len(out)} values, expected {names}")
        return out

    def learn_rows(self, two, three):
        """Learn `rows` from the leaves of the block's other arguments for two samples and for three."""
        if two is not None and len(two) == len(three):
            kinds = [(leaf_size(a), leaf_size(b)) for a, b in zip(two, three, strict=True)]
            if all(a == b or (a, b) == (2, 3) for a, b in kinds):
                self.rows = [None if a is None else a != b for a, b in kinds]

    def make_call(self, given, names, n):
        """call(streams, rows, plain) for some of n samples, with the same rows of all other arguments that have rows.

        None if it is not known which these are.
        """
        leaves, form = flatten_others(given, names)
        if self.rows is None or len(self.rows) != len(leaves):
            return None
        for has, size in zip(self.rows, map(leaf_size, leaves), strict=True):
            if (has is None) != (size is None) or (has and size != n):
                return None

        def call(streams, rows, plain):
            taken = [take(leaf, rows) if has else leaf for leaf, has in zip(leaves, self.rows, strict=True)]
            return self.call(tree_unflatten(taken, form), names, streams, plain)

        return call

    def run(self, *inputs, **options):
        """The block's own forward; recomputed in the backward if the stack says so."""
        if self.stack.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.run_plain, *inputs, use_reentrant=False, **options)
        return self.run_plain(*inputs, **options)

    def run_plain(self, *inputs, **options):
        return (self.compiled or type(self.block).forward)(self.block, *inputs, **options)

    def compile(self, **options):
        """Compile the block's own forward, and not what is around it."""
        self.compiled = torch.compile(type(self.block).forward, **options)


def leaf_size(leaf):
    """First size of a tensor, 0 for a single number, None for anything else."""
    return (len(leaf) if leaf.ndim else 0) if torch.is_tensor(leaf) else None


def flatten_others(given, names):
    """(leaves, form) of a block's arguments without the streams `names`; see torch's pytree."""
    return tree_flatten({**given, **dict.fromkeys(names)})


def show(observe, layer, before, after):
    """Streams after an observer has seen them; it sees the tokens of one stream, or tuples of those of several.

    A block that ends a stream, as SD3's last one, returns None for it, which is not shown.
    """
    live = [place for place, stream in enumerate(after) if stream is not None]
    seen = [[streams[place] for place in live] for streams in (before, after)]
    replaced = observe(layer, *(tuple(each) if len(live) > 1 else each[0] for each in seen))
    if replaced is None:
        return after
    new = dict(zip(live, replaced if len(live) > 1 else [replaced], strict=True))
    return [new.get(place) for place in range(len(after))]


def blend(before, after, mask):
    """Streams of the samples of mask (N,) 1 after the block, those of 0 before it; exactly, and with gradients."""
    if not mask.requires_grad and (mask == mask[0]).all():  # nothing to mix, and so no change of precision either
        return list(after if mask[0] else before)
    blended = []
    for x, out in zip(before, after, strict=True):
        m = mask.to(out.dtype).view(-1, *[1] * (out.ndim - 1))
        blended.append(out * m + x * (1 - m))
    return blended


class RoutedBlocks(BlockStack):
    """The blocks of one stack, which the network's own forward calls; passing: what is done to them meanwhile."""

    passing = None

    def __init__(self, blocks, first, keeps_last):
        super().__init__(blocks)
        for place, block in enumerate(self):
            block.forward = Routed(self, first + place, block, keeps_last and place == len(self) - 1)
            block.compile = block.forward.compile

    def __getitem__(self, index):
        """A block, or a plain list of some; a slice of a ModuleList is otherwise made by its own class."""
        return nn.ModuleList(list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)


class PrunableNetwork:
    """What is added to a class of diffusers, see make_network.

    The forward takes the class's own arguments, `mask` and `observe` as other networks of ours, `kept` as a BlockStack,
    `record`, see Passing, and `plain`, to do what the class does. Called as diffusers calls it, it does what diffusers'
    network does, without the layers that its gates drop.
    """

    prepared = False
    has_idle_weights = True  # such as the last block's for a stream of text that ends there

    def forward(self, *inputs, mask=None, observe=None, kept=None, record=None, plain=False, **options):
        if plain:
            return super().forward(*inputs, **options)
        if kept is None and mask is None and hasattr(self, "gumbel_gates"):
            mask, kept = choose_layers(self, len(next(iter((*inputs, *options.values())))))
        stacks = self.routed_stacks()
        is_sparse = mask is not None and self.prepared and not stacks[0].dense
        routes = Routes(mask, stacks[0].gate_samples) if is_sparse else None
        for stack in stacks:
            stack.passing = Passing(mask, routes, kept, observe, record)
        try:
            return super().forward(*inputs, **options)
        finally:
            for stack in stacks:
                stack.passing = None

    def routed_stacks(self):
        """Its RoutedBlocks, in forward order."""
        return [getattr(self, stack.name) for stack in self.stacks]

    def blocks_to_compile(self):
        """Modules that torch.compile takes one by one."""
        return [block for stack in self.routed_stacks() for block in stack]

    def prepare(self, make_inputs):
        """Compare this very network with the plain and the cut one; once, before layers are left out of it.

        make_inputs: n -> keyword arguments of the class's forward for n samples. Raises InputError with what differs.
        """
        if self.prepared:
            return
        mode, device = self.training, next(self.parameters()).device
        self.eval()
        try:
            # Making networks draws numbers, which those of the step must not depend on.
            draws = torch.random.fork_rng(devices=[] if device.type == "cpu" else [device])
            with torch.no_grad(), adapters_off(self), uncompiled(self), draws:
                check_network(self, make_inputs)
            COMPARED.add(self.class_name)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # it may be any: of a block that is given other tokens than it knows
            self.prepared = False
            raise InputError(f"--model: no layer of this {self.class_name} can be left out ({error})") from None
        finally:
            self.train(mode)


@contextmanager
def uncompiled(net):
    """Run the blocks of a network as they are: compiled ones round otherwise."""
    blocks = [block.forward for block in net.blocks_to_compile()]
    compiled = [block.compiled for block in blocks]
    try:
        for block in blocks:
            block.compiled = None
        yield
    finally:
        for block, function in zip(blocks, compiled, strict=True):
            block.compiled = function


def make_network(class_name, config, groups=None, candidates="all", **about):
    """A network of diffusers' class `class_name`, whose stacks can be masked, observed, checkpointed and pruned.

    groups, candidates: of its gates, see pruning.gates.LayerGates. about: attributes such as in_channels.
    """
    net, stacks, first = build_class(class_name, config), find_stacks(class_name, config), 0
    net.__class__ = make_class(type(net))
    for stack in stacks:
        blocks = RoutedBlocks(getattr(net, stack.name), first, stack.keeps_last)
        setattr(net, stack.name, blocks)
        first += stack.depth
    net.stacks, net.class_name, net.plain_config = stacks, class_name, config
    for name, value in about.items():
        object.__setattr__(net, name, value)
    if groups is not None:
        net.gumbel_gates = LayerGates(groups, first, candidates, fixed_layers(stacks))
    return net


@cache
def make_class(plain):
    return type(plain.__name__, (PrunableNetwork, plain), {"__module__": plain.__module__})


def build_cut(class_name, config, state, kept):
    """Diffusers' plain network with only the layers `kept`; config: of the whole one.

    state: of the cut one, all of whose weights have to be there; it shares their tensors. Raises ValueError if they do
    not fit.
    """
    with parameters_on_meta():
        net = build_class(class_name, cut_config(config, find_stacks(class_name, config), kept))
    try:
        net.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the weights do not make a {class_name} ({str(error)[:300]})") from None
    return net.eval()


def first_output(net, inputs, **options):
    """The first output of a network, for keyword arguments of diffusers' forward; of a list of samples, their stack."""
    if "return_dict" in list_arguments(getattr(net, "class_name", type(net).__name__)):
        inputs = {**inputs, "return_dict": False}
    out = net(**inputs, **options)
    out = out[0] if isinstance(out, tuple | list) else out
    return torch.stack(list(out)) if isinstance(out, list) else out


def check_network(net, make_inputs):
    """Raise ValueError unless a network of make_network agrees, to the bit, with diffusers' plain and cut ones.

    Two cuts are compared, so that every layer is left out once; not of a network that is split over processes, whose
    class has to be a known one. It learns which arguments of its blocks have a row for every sample.
    """
    inputs, records, depth = make_inputs(2), ({}, {}), sum(stack.depth for stack in net.stacks)
    plain = first_output(net, inputs, plain=True)
    expect_equal(first_output(net, inputs, kept=range(depth), record=records[0]), plain, "with all layers")
    first_output(net, make_inputs(3), kept=range(depth), record=records[1])
    for block in net.blocks_to_compile():
        block.forward.learn_rows(*(record.get(block.forward.layer) for record in records))
    net.prepared = True
    expect_equal(first_output(net, inputs, mask=plain.new_ones(2, depth)), plain, "with all layers")
    is_split = any(hasattr(p, "full_tensor") for p in net.parameters())
    if is_split and net.class_name not in COMPARED:
        raise ValueError("no cut one was compared yet, and it cannot be with --shard; begin without")
    state, names = plain_state(net), tuple(stack.name for stack in net.stacks)
    for start in () if is_split else (0, 1):
        kept = sorted({*range(start, depth, 2), *fixed_layers(net.stacks)})
        cut = build_cut(net.class_name, net.plain_config, keep_layers(state, kept, names), kept).to(plain.device)
        mask = plain.new_zeros(2, depth).index_fill(1, torch.tensor(kept, device=plain.device), 1.0)
        expect_equal(first_output(net, inputs, mask=mask), first_output(cut, inputs), f"with layers {kept} alone")


def plain_state(net):
    """The state dict of a network under diffusers' names alone: without gates and adapters."""
    state = net.state_dict().items()
    return {key: value for key, value in state if not key.startswith("gumbel_gates.") and not is_adapter(key)}


def expect_equal(found, expected, when):
    """Raise ValueError unless two outputs are the same bits; on a GPU, whose sums may vary, the same to a hundredth."""
    close = NEAR if found.device.type != "cpu" else 0.0
    is_near = found.shape == expected.shape and bool((found - expected).norm() <= close * expected.norm())
    if not is_near:
        gap = f"{(found - expected).abs().max():.3g}" if found.shape == expected.shape else "another shape"
        raise ValueError(f"{when} its output is not that of diffusers' network (largest difference {gap})")


def save_network(path, class_name, config, state, kept):
    """Write what is left of a network as a folder that diffusers opens, whole, in place of an earlier one.

    config: of the whole network. state: of the cut one, with only the layers `kept`. Raises ValueError if they do not
    fit, or nobody has seen that the class can be cut.
    """
    is_cut = len(kept) < sum(stack.depth for stack in find_stacks(class_name, config))
    if is_cut and class_name not in COMPARED:
        raise ValueError(f"no cut {class_name} was compared yet; prune_by_score.py does it with --data-path")
    net, path = build_cut(class_name, config, state, kept), Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        net.save_pretrained(Path(folder) / path.name)
        if path.is_dir():
            path.rename(Path(folder) / "earlier")
        (Path(folder) / path.name).rename(path)
