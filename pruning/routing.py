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
        block, (kept, skipped) = stack[layer], self.rows[layer]
        before, y = _run_rows(stack.run, block, kept, (x, *context), stack.together)
        idle = []
        if y is None:  # the parameters still get gradients (of zero), which DDP and the optimizer's averages wait for
            y, idle = before, [p for p in block.parameters() if p.requires_grad]
        delta = rest = None
        if self.mask.requires_grad:
            with torch.no_grad():  # after the pass with gradients: autocast's copies of weights come from the first
                delta = y - before
                before, after = _run_rows(_call, block, skipped, (x, *context), stack.together)
                rest = before if after is None else after - before
                if torch.is_autocast_enabled(x.device.type):  # as precise as what they are made of
                    dtype = torch.get_autocast_dtype(x.device.type)
                    delta, rest = delta.to(dtype), rest.to(dtype)
        gate = self.mask[:, layer]
        return _Merge.apply(x, y.to(x.dtype), gate, delta, rest, kept, skipped, self.weight, *idle)


def _run_rows(run, block, rows, tensors, together):
    """These rows of tokens, and run(block, ...) of these rows of tokens and context; None for no rows.

    together: without rows the block runs on the first sample and its output is thrown away. A block whose weights are
    sharded among processes needs all of them at every call and in its backward, which brings gradients of zero.
    """
    inputs = [_take(tensor, rows) for tensor in tensors]
    if len(inputs[0]):
        return inputs[0], run(block, *inputs)
    return inputs[0], run(block, *(tensor[:1] for tensor in tensors))[:0] if together else None


def _call(block, *inputs):
    return block(*inputs)


def _rows(column, start, count):
    """`count` entries of a column from `start`, or None for all of them, which need no gathering."""
    return None if count == len(column) else column[start : start + count]


def _take(tensor, rows):
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
        at_kept = _take(g, kept)
        gate = None
        if ctx.needs_input_grad[2]:
            shape, dtype = ctx.gate_shape
            gate = torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=g.device)
            gate[_index(skipped)] = _dot(_take(g, skipped), rest).to(gate.dtype) * ctx.weight
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
