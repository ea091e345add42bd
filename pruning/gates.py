"""Which layers run: the stack of blocks, the gates that choose among its layers, and the decision they reach."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pruning.patterns import candidate_masks, check_candidates, check_groups, fixed_places
from pruning.routing import Routes

INITIAL_LOGIT = 0.02


class BlockStack(nn.ModuleList):
    """The blocks of a transformer, run in order; learning, scoring, surgery and distillation all act here.

    dense: blend all samples instead of leaving out the backward of skipped ones; the same gradients at a higher price.
    gate_samples: share of the skipped samples from which the gates learn, see `Routes`; not in the dense form.
    checkpointing: recompute the activations of every block in the backward instead of keeping them.
    together: call every block also where no sample of this process needs it, see `Routes`.
    """

    dense, gate_samples, checkpointing, together = False, 1.0, False, False

    def forward(self, x, *context, mask=None, kept=None, observe=None):
        """Run the blocks on tokens x (N, T, D).

        mask: (N, L) of 0/1, blends each block with the identity, per sample. kept: layers to run, others are skipped.
        observe: called as observe(layer, tokens_before, tokens_after) after every block that runs; tokens that it
        returns are passed on in place of the block's.
        """
        routes = Routes(mask, self.gate_samples) if mask is not None and not self.dense else None
        for layer, block in enumerate(self):
            if kept is not None and layer not in kept:
                continue
            if routes:
                out = routes.run(self, layer, x, *context)
            else:
                out = self.run(block, x, *context)
                if mask is not None:
                    # This form returns x or block(x) exactly for 0 and 1; x + m * (block(x) - x) would not.
                    m = mask[:, layer].to(out.dtype).view(-1, *[1] * (x.ndim - 1))
                    out = out * m + x * (1 - m)
            replaced = observe(layer, x, out) if observe is not None else None
            x = out if replaced is None else replaced
        return x

    def run(self, block, *inputs):
        """One block on tokens and context."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def block_stacks(model):
    """All BlockStacks of a network, in forward order."""
    return [module for module in model.modules() if isinstance(module, BlockStack)]


def set_routing(model, dense, gate_samples):
    """Say how all stacks of a network treat samples that skip a layer, see BlockStack."""
    for stack in block_stacks(model):
        stack.dense, stack.gate_samples = dense, gate_samples


class LayerGates(nn.ParameterList):
    """One logit per candidate of every N:M group, sampled by a straight-through Gumbel-softmax (paper, section 3.3).

    Parameter g has shape (1, candidates). `tau` and `scaling` are set from outside, as functions of the step.
    candidates: "all"; "contiguous", those that drop layers in a row; or "layers", all of them, but the logit of one is
    the sum of the scores of the layers that it keeps: parameter g has shape (1, M), and every draw tells of all M.
    fixed: layers that every candidate keeps.
    """

    def __init__(self, groups, depth, candidates="all", fixed=()):
        check_groups(groups, depth)
        if candidates != "contiguous":
            check_candidates(groups)
        stay = fixed_places(groups, fixed)
        tables = [
            candidate_masks(n, m, candidates == "contiguous", places)
            for (n, m), places in zip(groups, stay, strict=True)
        ]
        sizes = [table.shape[1 if candidates == "layers" else 0] for table in tables]
        super().__init__(nn.Parameter(torch.full((1, size), INITIAL_LOGIT, device="cpu")) for size in sizes)
        self.groups, self.has_scores = [tuple(group) for group in groups], candidates == "layers"
        kinds = list(zip(self.groups, stay, strict=True))
        self.alike = [[g for g, each in enumerate(kinds) if each == kind] for kind in dict.fromkeys(kinds)]
        self.tau, self.scaling = 1.0, 1.0
        for g, table in enumerate(tables):
            self.register_buffer(f"candidates_{g}", table, persistent=False)

    def logits(self, g):
        """Of the candidates of group g, (1, candidates)."""
        if not self.has_scores:
            return self[g]
        with torch.autocast(self[g].device.type, enabled=False):
            return self[g] @ self.get_buffer(f"candidates_{g}").T

    def draw_gumbel(self, n):
        """Gumbel noise, one (n, candidates) tensor per group."""
        drawn = []
        for g, p in enumerate(self):
            size = n, len(self.get_buffer(f"candidates_{g}"))
            drawn.append(torch.empty(size, dtype=p.dtype, device=p.device).exponential_())
        return torch._foreach_neg(torch._foreach_log(drawn))

    def draw(self, n, gumbel=None):
        """Draw one candidate per group for each of n samples: mask (n, L), exactly 0/1, with the softmax's gradient."""
        gumbel, masks = gumbel or self.draw_gumbel(n), [None] * len(self)
        for members in self.alike:  # groups of the same N and M together
            table = self.get_buffer(f"candidates_{members[0]}")
            logits = torch.stack([self.logits(g) for g in members])
            noise = torch.stack([gumbel[g] for g in members])
            with torch.autocast(table.device.type, enabled=False):
                soft = ((logits * self.scaling + noise) / self.tau).softmax(-1)  # (groups, n, candidates)
                drawn = table[soft.argmax(-1)] + (soft - soft.detach()) @ table
            for g, mask in zip(members, drawn.unbind(), strict=True):
                masks[g] = mask
        return torch.cat(masks, dim=1)

    def choose(self, n):
        """Choose one candidate per group for each of n samples, as likely as the logits say at any temperature.

        Returns the mask (n, L) of 0/1 without gradients, and the log-probability (n,) of each sample's choice.
        """
        masks, total = [], 0.0
        for g, noise in enumerate(self.draw_gumbel(n)):
            scaled = self.logits(g)[0] * self.scaling
            chosen = (scaled.detach() + noise).argmax(-1)
            masks.append(self.get_buffer(f"candidates_{g}")[chosen])
            total = total + scaled.log_softmax(-1)[chosen]
        return torch.cat(masks, dim=1), total


class Decision(NamedTuple):
    """Layers that stay, ascending, and for every group the probability of the chosen candidate."""

    kept: list
    confidence: list


@torch.no_grad()
def decide(model):
    """Read the decision of a gated network, or of its (averaged) LayerGates: the best candidate, first one on ties.

    Raises ValueError if a logit is not finite.
    """
    gates = getattr(model, "gumbel_gates", model)
    if not all(logits.isfinite().all() for logits in gates):
        raise ValueError("the gates are not finite, so they choose nothing")
    kept, confidence, start = [], [], 0
    for g, (_, m) in enumerate(gates.groups):
        logits = gates.logits(g)[0]
        candidate = gates.get_buffer(f"candidates_{g}")[logits.argmax()]
        kept += [start + i for i, keep in enumerate(candidate.tolist()) if keep]
        confidence.append((logits * gates.scaling).softmax(-1).max().item())
        start += m
    return Decision(kept, confidence)


@torch.no_grad()
def keep_probabilities(model):
    """Of every layer of a gated network, or of its LayerGates: the probability that a draw keeps it, 0 to 1."""
    gates = getattr(model, "gumbel_gates", model)
    found = []
    for g in range(len(gates.groups)):
        probabilities = (gates.logits(g)[0] * gates.scaling).softmax(-1)
        found += (probabilities @ gates.get_buffer(f"candidates_{g}")).tolist()
    return found


@torch.no_grad()
def likeliest(model, count):
    """The `count` most probable choices of a gated network, or of its LayerGates: lists of kept layers, best first.

    Fewer, if there are no more. Groups choose for themselves, so the best few of all are among the best few of each.
    """
    gates = getattr(model, "gumbel_gates", model)
    found, start = [(0.0, [])], 0
    for g, (_, m) in enumerate(gates.groups):
        values, order = (gates.logits(g)[0].double() * gates.scaling).log_softmax(-1).sort(descending=True, stable=True)
        rows = gates.get_buffer(f"candidates_{g}")[order[:count]].tolist()
        layers = [[start + i for i, keep in enumerate(row) if keep] for row in rows]
        longer = [
            (total + value, kept + more)
            for total, kept in found
            for value, more in zip(values.tolist(), layers, strict=False)
        ]
        found = sorted(longer, key=lambda each: -each[0])[:count]
        start += m
    return [kept for _, kept in found]


def choose_layers(model, n, mask=None):
    """What a network passes to its stacks for n samples: (mask, layers kept by all).

    A given mask wins; else gates, if there are any, draw in training mode and decide in eval mode.
    """
    if mask is not None or not hasattr(model, "gumbel_gates"):
        return mask, None
    return (model.gumbel_gates.draw(n), None) if model.training else (None, decide(model).kept)


def interpolate(value_range, step, total_steps):
    """Value at `step` (from 0) on the line from value_range[0] to value_range[1] over all steps, never beyond."""
    first, last = value_range
    return first + (last - first) * min(step / max(total_steps - 1, 1), 1.0)


@dataclass(frozen=True)
class GateSchedule:
    """Temperature and scaling of gates over the steps, each on a line from a first to a last value."""

    tau_range: tuple
    scaling_range: tuple
    total_steps: int

    def apply(self, step, *gates):
        """Set both of all these LayerGates to what they are at `step`."""
        for each in gates:
            each.tau = interpolate(self.tau_range, step, self.total_steps)
            each.scaling = interpolate(self.scaling_range, step, self.total_steps)
