"""LoRA and the other weight updates that stand for fine-tuning."""

import pytest
import torch

from diffusion import create_diffusion
from diffusion.objectives import GaussianObjective, TrainStep
from engine.weight_files import open_weights
from families import create_model
from pruning.lora import LoRALinear, adapters_off, add_lora, learned_weights, merge_adapters, weight_update

GROUPS = [[1, 2]] * 3


def test_size_at_full_scale():
    """DiT-XL/2 has 144 linear layers; rank 8 adds 6,001,920 values."""
    with torch.device("meta"):
        net = create_model("DiT-XL-1-2")
    adapters = weight_update(net, True, 8)
    assert sum(isinstance(module, LoRALinear) for module in net.modules()) == 144
    assert len(adapters) == 288
    assert sum(p.numel() for p in adapters) == 6_001_920
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert trained == 6_001_920 + sum(p.numel() for p in net.gumbel_gates)


def test_identity_at_start(small_net, batch):
    net = small_net()
    before = net(*batch)
    add_lora(net, 4)
    assert torch.equal(net(*batch), before)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 2.0), (2.0, 0.5)])
def test_forward(alpha, scale):
    """y = W x + b + alpha / rank * B A x, with alpha = 2 * rank by default."""
    net = torch.nn.Sequential(torch.nn.Linear(5, 3))
    add_lora(net, 4, alpha)
    torch.nn.init.normal_(net[0].lora_b.weight)
    x = torch.randn(2, 5)
    update = scale * net[0].lora_b.weight @ net[0].lora_a.weight
    torch.testing.assert_close(net(x), x @ (net[0].weight + update).T + net[0].bias)


def test_rank_must_be_positive(small_net):
    with pytest.raises(ValueError, match="rank 0"):
        add_lora(small_net(), 0)


@pytest.mark.parametrize("update", ["lora", "full", "none"])
def test_what_is_trained(small_net, batch, update):
    """LoRA trains adapters and gates only; a full update all weights; without an update the gates alone move."""
    net = small_net(6, GROUPS).train()
    weights = weight_update(net, update != "none", 2 if update == "lora" else None)
    assert len(weights) == {"lora": 68, "full": sum(1 for _ in net.parameters()) - 4, "none": 0}[update]
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD([*weights, *net.gumbel_gates], lr=0.1)
    step = TrainStep(net, GaussianObjective(create_diffusion()))
    torch.manual_seed(0)
    for _ in range(6):  # the first steps move lora_b away from zero, later ones lora_a
        optimizer.zero_grad()
        step(batch[0], batch[2])["loss"].mean().backward()
        optimizer.step()
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    gates = {name for name in before if name.startswith("gumbel_gates")}
    adapters = {name for name in before if "lora_" in name}
    expected = {"lora": adapters | gates, "full": set(before) - {"pos_embed"}, "none": gates}[update]
    assert moved == expected


@pytest.mark.parametrize("update", ["lora", "full", "none"])
def test_learned_weights(small_net, batch, update):
    """The plain network of the learned weights computes what the network that learnt them does."""
    original = small_net(6).state_dict()
    net = small_net(6, groups=GROUPS)
    net.load_state_dict(original, strict=False)
    weights = weight_update(net, update != "none", 4 if update == "lora" else None)
    torch.manual_seed(1)
    for p in weights:
        p.data += 0.02 * torch.randn_like(p)
    plain = small_net(6)
    learned = learned_weights(net, original)
    plain.load_state_dict(learned)
    every = torch.ones(4, 6)
    torch.testing.assert_close(plain(*batch), net(*batch, mask=every), rtol=1e-4, atol=1e-5)
    assert (update == "none") == all(torch.equal(learned[key], original[key]) for key in original)


def test_frozen_weights_stay_as_precise_as_they_were(small_net):
    """A network whose frozen matrices were cast for the compute gives back the original ones, adapters added."""
    original = small_net(6).state_dict()
    net = small_net(6, groups=GROUPS)
    net.load_state_dict(original, strict=False)
    weight_update(net, True, 4)
    net.blocks[0].attn.qkv.weight.data = net.blocks[0].attn.qkv.weight.data.bfloat16()
    learned = learned_weights(net, original)
    assert all(torch.equal(learned[key], original[key]) for key in original)


def test_merged_adapters_compute_the_same(small_net, batch):
    net, plain = small_net(), small_net()
    add_lora(net, 4)
    for name, p in net.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(p, std=0.05)
    before = plain.state_dict()
    merged = merge_adapters(net.state_dict())
    assert merged.keys() == before.keys()
    assert not torch.equal(merged["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"])
    plain.load_state_dict(merged)
    torch.testing.assert_close(plain(*batch), net(*batch), rtol=1e-4, atol=1e-5)


def test_states_with_adapters_are_read_as_weights(small_net, tmp_path):
    """Also half-precision matrices get the update in float32."""
    net = small_net()
    add_lora(net, 4)
    for name, p in net.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(p, std=1e-4)
    state = {key: value.bfloat16() if key.endswith("qkv.weight") else value for key, value in net.state_dict().items()}
    torch.save({"model": state, "ema": state, "train_steps": 1}, tmp_path / "s.pt")
    opened = open_weights(tmp_path / "s.pt", "--ckpt")
    assert not [key for key in opened.shapes if "lora" in key]
    read, expected = opened.read(), merge_adapters(state)
    assert read.keys() == opened.shapes.keys()
    assert torch.equal(read["blocks.0.attn.qkv.weight"], expected["blocks.0.attn.qkv.weight"])
    assert read["blocks.0.attn.qkv.weight"].dtype == torch.float32
    assert not torch.equal(read["blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"].float())


def test_adapters_off(small_net, batch):
    net = small_net()
    before = net(*batch)
    add_lora(net, 4)
    for name, p in net.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(p)
    learned = net(*batch)
    with adapters_off(net):
        assert torch.equal(net(*batch), before)
    assert torch.equal(net(*batch), learned)
    assert not torch.equal(learned, before)
