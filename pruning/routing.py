"""Skipped samples need no backward: one layer at a time, gradients only for the samples that keep it.

With a mask m of 0/1 per sample, out = x + m (block(x) - x). Where m = 0, neither the block's weights nor x get a
gradient through the block; only the gate does, and it needs no more than the number <dL/dout, block(x) - x>.
"""

import torch
from torch.autograd.function import once_differentiable


class Routes:
    """Which samples keep and which skip each layer: a mask (N, L) of exactly 0 and 1, brought to the host once.

    share: part of the skipped samples that are run at all, chosen at random. The differences they give are weighted by
    1 / share, so the expected gradient of the gates stays the same.
    """

    def __init__(self, mask, share=1.0):
        self.mask, self.weight = mask, 1 / share
        kept = mask.detach().cpu() > 0.5  # the only wait for the device
        counts = kept.sum(0).tolist()
        # In each column: the samples that keep the layer, then the others, in random order if not all are run.
        place = torch.rand(kept.shape, device="cpu") if share < 1 else torch.zeros(kept.shape, device="cpu")
        order = place.masked_fill(kept, -1.0).argsort(dim=0, stable=True)
        skipped = torch.tensor([(len(mask) - count) * share for count in counts], device="cpu")
        if share < 1:  # rounded up or down at random, so that every skipped sample is run with probability `share`
            skipped = (skipped + torch.rand(len(counts), device="cpu")).floor()
        order = order.T.contiguous().to(mask.device, non_blocking=True)
        ends = zip(order, counts, skipped.int().tolist(), strict=True)
        self.rows = [(_rows(column, 0, count), _rows(column, count, rest)) for column, count, rest in ends]

    def run(self, stack, layer, x, *context):
        """Tokens x (N, T, D) -> layer `layer` of x for the samples that keep it, x for the others."""

        def call(streams, rows, plain):
            inputs = (*streams, *(take(tensor, rows) for tensor in context))
            return [(_call if plain else stack.run)(stack[layer], *inputs)]

        return self.route(layer, [x], stack[layer], call, stack.together)[0]

    def route(self, layer, streams, block, call, together=False):
        """The same for a block that passes on several streams of tokens, each (N, ...): the list of them after it.

        call(streams, rows, plain): the block's streams for some samples, of which `streams` are given and `rows` are
        the numbers (None: all); plain: without gradients. together: see BlockStack.
        """
        kept, skipped = self.rows[layer]
        before, after = _run_rows(call, kept, streams, together, plain=False)
        idle = []
        if after is None:
            # The parameters still get gradients (of zero), which DDP and the optimizer's averages wait for.
            after, idle = before, [p for p in block.parameters() if p.requires_grad]
        deltas = rests = [None] * len(streams)
        if self.mask.requires_grad:
            with torch.no_grad():  # after the pass with gradients: autocast's copies of weights come from the first
                deltas = _differences(before, after)
                before, rests = _run_rows(call, skipped, streams, together, plain=True)
                rests = before if rests is None else _differences(before, rests)
                device = streams[0].device.type
                if torch.is_autocast_enabled(device):  # as precise as what they are made of
                    dtype = torch.get_autocast_dtype(device)
                    deltas, rests = ([each.to(dtype) for each in many] for many in (deltas, rests))
        gate, merged = self.mask[:, layer], []
        for x, y, delta, rest in zip(streams, after, deltas, rests, strict=True):
            # Under autocast the first block may turn half precision into float32, which must not be undone.
            dtype = torch.promote_types(x.dtype, y.dtype)
            x, y = x.to(dtype), y.to(dtype)
            merged.append(_Merge.apply(x, y, gate, delta, rest, kept, skipped, self.weight, *idle))
            idle = []  # once is enough
        return merged


def _run_rows(call, rows, streams, together, plain):
    """These rows of streams of tokens, and the block's streams of them; None for no rows.

    together: without rows the block runs on the first sample and its output is thrown away. A block whose weights are
    sharded among processes needs all of them at every call and in its backward, which brings gradients of zero.
    """
    before = [take(x, rows) for x in streams]
    if len(before[0]):
        return before, call(before, rows, plain)
    if not together:
        return before, None
    first = torch.zeros(1, dtype=torch.long, device=streams[0].device)
    return before, [out[:0] for out in call([x[:1] for x in streams], first, plain)]


def _differences(before, after):
    """after - before of several tensors."""
    return [y - x for x, y in zip(before, after, strict=True)]


def _call(block, *inputs):
    return block(*inputs)


def _rows(column, start, count):
    """`count` entries of a column from `start`, or None for all of them, which need no gathering."""
    return None if count == len(column) else column[start : start + count]


def take(tensor, rows):
    """The rows of a tensor (N, ...), of which None means all."""
    return tensor if rows is None else tensor.index_select(0, rows)


def _index(rows):
    """The same, to write to."""
    return ... if rows is None else rows


class _Merge(torch.autograd.Function):
    """x with the rows `kept` replaced by y; delta and rest: block(x) - x of the rows `kept` and `skipped`."""

    @staticmethod
    def forward(ctx, x, y, gate, delta, rest, kept, skipped, weight, *idle):
        ctx.save_for_backward(delta, rest, kept, skipped)
        ctx.weight, ctx.gate_shape, ctx.idle = weight, (gate.shape, gate.dtype), idle
        if kept is None:
            return y.view_as(y)
        return x.index_copy(0, kept, y) if len(kept) else x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        delta, rest, kept, skipped = ctx.saved_tensors
        at_kept = take(g, kept)
        gate = None
        if ctx.needs_input_grad[2]:
            shape, dtype = ctx.gate_shape
            gate = torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=g.device)
            gate[_index(skipped)] = _dot(take(g, skipped), rest).to(gate.dtype) * ctx.weight
            if len(at_kept):
                gate[_index(kept)] = _dot(at_kept, delta).to(gate.dtype)
            gate = gate.to(dtype)
        idle = [torch.zeros_like(p) for p in ctx.idle]
        passed = None
        if kept is not None:  # else nothing goes past the block
            passed = g.index_fill(0, kept, 0) if len(kept) else g
        return passed, at_kept, gate, None, None, None, None, None, *idle


def _dot(a, b):
    """Inner products (n,) of two tensors (n, ...), accumulated in at least float32."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    return (a.to(dtype) * b.to(dtype)).flatten(1).sum(1)
