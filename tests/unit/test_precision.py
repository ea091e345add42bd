"""Half precision stays near float32, on whatever device the tests run on."""

import pytest
import torch
from machine import DEVICE

from engine.checkpoint import Weights, save_weights
from engine.run import Run, cast_frozen_weights, unfuse_attention
from families import create_model, family_of

BOUNDS = {"bf16": (torch.bfloat16, 2e-2), "fp16": (torch.float16, 4e-3)}  # relative, of the norms


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("name", ["DiT-T/2", "SiT-T/2", "MAR-T"])
def test_losses_and_gradients(name, precision, is_fused):
    """The output of a training step's network, and the gradient of its loss, against those in float32."""
    dtype, bound = BOUNDS[precision]
    torch.manual_seed(0)
    net = create_model(name, input_size=8, num_classes=5).to(DEVICE).eval()
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    family = family_of(name)
    objective = family.make_objective(**family.own_defaults("train")).to(DEVICE)
    x, y = torch.randn(4, net.in_channels, 8, 8), torch.arange(4)
    draw = objective.draw(net, x, y)

    def compute():
        net.zero_grad()
        prediction = objective.predict(net, x, y, draw)
        objective.loss(prediction.float(), x, draw)["loss"].mean().backward()
        gradients = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
        return prediction.detach().float(), torch.cat(gradients)

    expected = compute()
    if not is_fused:
        unfuse_attention(net)
    with torch.autocast(DEVICE.type, dtype):
        found = compute()
    for half, full in zip(found, expected, strict=True):
        error = ((half - full).norm() / full.norm()).item()
        assert 0 < error <= bound


@pytest.mark.parametrize("precision", BOUNDS)
def test_frozen_weights_change_nothing(precision):
    """Weights that are held in half precision give the bits that autocast's copies of them give."""
    torch.manual_seed(0)
    net = create_model("DiT-T/2", input_size=8, num_classes=5).to(DEVICE).eval().requires_grad_(False)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.02)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.arange(2)
    with torch.autocast(DEVICE.type, BOUNDS[precision][0]):
        expected = net(*inputs)
        assert torch.equal(cast_frozen_weights(net, precision)(*inputs), expected)


@pytest.mark.parametrize(("run_in", "teacher_in"), [("fp32", "bf16"), ("bf16", "fp32"), ("bf16", "bf16")])
def test_precision_of_a_teacher(run_in, teacher_in):
    """A frozen network computes in its own precision inside the run's, with the bits of a run in that precision."""
    torch.manual_seed(0)
    net = create_model("DiT-T/2", input_size=8, num_classes=5).to(DEVICE)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.02)
    inputs = [each.to(DEVICE) for each in (torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.arange(2))]
    run, like = Run(DEVICE.type, run_in), Run(DEVICE.type, teacher_in)
    with like.autocast(), torch.no_grad():
        expected = net.eval()(*inputs)
    teacher = run.freeze(net, teacher_in)
    with run.autocast(), torch.no_grad():
        assert torch.equal(teacher(*inputs), expected)
    held = torch.float32 if teacher_in == "fp32" else torch.bfloat16
    assert teacher.blocks[0].mlp.fc1.weight.dtype == held
    assert teacher.pos_embed.dtype == torch.float32


def test_frozen_matrices_are_built_in_half_precision(tmp_path):
    """Without ever being held in float32: the same as casting them afterwards."""
    net = create_model("DiT-T/2", input_size=8, num_classes=5)
    save_weights(tmp_path / "w.safetensors", net.state_dict(), model="DiT-T/2")
    weights, config = Weights(tmp_path / "w.safetensors", "--ckpt"), {"input_size": 8, "num_classes": 5}
    built = weights.build("DiT-T/2", config, "cpu", "bf16").state_dict()
    expected = cast_frozen_weights(weights.build("DiT-T/2", config, "cpu").requires_grad_(False), "bf16").state_dict()
    assert {key: value.dtype for key, value in built.items()} == {key: v.dtype for key, v in expected.items()}
    assert {value.dtype for value in built.values()} == {torch.float32, torch.bfloat16}
    assert all(torch.equal(built[key], expected[key]) for key in expected)
