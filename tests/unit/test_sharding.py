"""Parts of engine/sharding.py, in a group of one process; tests/e2e/test_shard.py runs two."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from engine.sharding import clip_gradients, put_together, take_part, take_parts
from pruning.gates import BlockStack


@pytest.fixture
def mesh(tmp_path):
    """A mesh of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("placement", [Shard(0), Replicate()])
def test_parts_of_a_state(mesh, placement):
    """What is taken apart is put together again; plain values and tensors of other shapes stay what they are."""
    like = DTensor.from_local(torch.zeros(5, 3), mesh, [placement])
    state = {"a": torch.randn(5, 3), "b": torch.randn(2), 0: {"exp_avg": torch.randn(5, 3), "step": torch.tensor(3.0)}}
    parts = take_parts(state, {"a": like, 0: like})
    assert isinstance(parts["a"], DTensor)
    assert parts["a"].placements == like.placements
    assert parts["b"] is state["b"]
    assert parts[0]["step"] is state[0]["step"]
    whole = put_together(parts)
    assert torch.equal(whole["a"], state["a"])
    assert torch.equal(whole[0]["exp_avg"], state[0]["exp_avg"])
    parts["a"].to_local().zero_()
    assert state["a"].any(), "a part shares no memory with the state"


def test_part_of_another_shape(mesh):
    """Is left for load_state_dict to refuse."""
    value = torch.zeros(4, 3)
    assert take_part(value, DTensor.from_local(torch.zeros(5, 3), mesh, [Shard(0)])) is value


@pytest.mark.parametrize("limit", [0.5, 1e3, float("inf")])
def test_clipping(mesh, limit):
    """As torch clips, with empty shards and replicas among the gradients."""
    torch.manual_seed(0)
    plain = [nn.Parameter(torch.zeros(shape)) for shape in ((4, 3), (7,), (0, 3), (1, 2))]
    placements = [Shard(0), Shard(0), Shard(0), Replicate()]
    split = [nn.Parameter(DTensor.from_local(p.detach(), mesh, [q])) for p, q in zip(plain, placements, strict=True)]
    for p, q in zip(plain, split, strict=True):
        p.grad = torch.randn(p.shape)
        q.grad = DTensor.from_local(p.grad.clone(), mesh, q.placements)
    expected = torch.nn.utils.clip_grad_norm_(plain, limit)
    torch.testing.assert_close(clip_gradients(split, limit), expected)
    for p, q in zip(plain, split, strict=True):
        torch.testing.assert_close(q.grad.to_local(), p.grad)


def test_norm_that_is_not_finite(mesh):
    p = nn.Parameter(DTensor.from_local(torch.zeros(2), mesh, [Shard(0)]))
    p.grad = DTensor.from_local(torch.tensor([1.0, float("nan")]), mesh, [Shard(0)])
    assert not clip_gradients([p], 1.0).isfinite()


class Counted(nn.Linear):
    """A block that counts its calls."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("learns", [True, False], ids=["straight-through", "pairs"])
def test_every_block_is_called_as_often(learns):
    """`together`: also where all samples keep a layer, or none does; outputs and gradients stay the same."""
    torch.manual_seed(0)
    plain = BlockStack(Counted(4, 4) for _ in range(3))
    together = copy.deepcopy(plain)
    together.together = True
    x, found = torch.randn(5, 2, 4), []
    for stack in (plain, together):
        mask = torch.tensor([[1.0, 0, 1], [1, 0, 0], [1, 0, 1], [1, 0, 1], [1, 0, 0]], requires_grad=learns)
        out = stack(x, mask=mask)
        out.square().sum().backward()
        found.append([out, mask.grad, *(p.grad for p in stack.parameters())])
    assert [block.calls for block in together] == [2 if learns else 1] * 3
    assert [block.calls for block in plain] == ([1, 1, 2] if learns else [1, 0, 1])
    for one, other in zip(*found, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
