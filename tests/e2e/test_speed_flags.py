"""Flags that make runs cheaper leave the numbers alone: sparse or dense, checkpointed, accumulated, compiled, bf16."""

import json

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from diffusion import create_diffusion
from diffusion.objectives import GaussianObjective, TrainStep
from engine.data import LatentDataset
from engine.run import Run
from engine.trainer import Trainer, TrainingOptions
from engine.weight_files import read_file
from models import DiT
from pruning.gates import decide, interpolate
from pruning.lora import weight_update

TRAIN = ["--global-batch-size", "16", "--num-workers", "0", "--log-every", "1", "--epochs"]
LEARN = ["--model", "DiT-T-1-2", "--delta-w"]
PAIRS = ["--lora", "--gate-gradient", "pairs", "--target", "both"]


def run_training(run_script, latents, folder, name, *words, epochs=1):
    """Rows of metrics.jsonl, and the last training state, of a run with these flags."""
    save = ["--save-model", folder / "out.pt"] if name == "prune_by_learning" else []
    run_script(name, "--data-path", latents, "--results-dir", folder, *save, *TRAIN, epochs, *words)
    (run,) = (path for path in folder.iterdir() if path.is_dir())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return rows, read_file(max((run / "checkpoints").glob("*.pt")), "--resume")


def losses(rows):
    return torch.tensor([row["loss"] for row in rows if "loss" in row], dtype=torch.float64)


def learn_gates(latents, lora_rank, dense, steps=200):
    """Decisions after every step, and the gates at the end.

    In float64: in float32 a sum in another order may, sooner or later, flip a draw.
    """
    data = LatentDataset(latents)
    torch.manual_seed(0)
    net = DiT(8, 4, 3, 32, 6, 2, num_classes=10, groups=[[1, 2], [2, 4]]).double().train()
    for p in net.parameters():
        nn.init.normal_(p, std=0.1) if p.requires_grad else None
    net.blocks.dense = dense
    groups = [{"params": weight_update(net, True, lora_rank), "lr": 1e-3}]
    groups.append({"params": list(net.gumbel_gates), "lr": 1e-2})
    optimizer, step = torch.optim.AdamW(groups, weight_decay=0.0), TrainStep(net, GaussianObjective(create_diffusion()))
    decisions = []
    for k in range(steps):
        x, y = data.__getitems__([2 * ((16 * k + i) % len(data)) for i in range(16)])
        net.gumbel_gates.tau, net.gumbel_gates.scaling = interpolate((4, 0.1), k, steps), 100.0
        optimizer.zero_grad()
        step(x.double(), y)["loss"].mean().backward()
        optimizer.step()
        decisions.append(decide(net).kept)
    return decisions, torch.cat([gate.detach().flatten() for gate in net.gumbel_gates])


@pytest.mark.parametrize("lora_rank", [8, None], ids=["lora", "full"])
def test_sparse_and_dense_decide_alike(latents, lora_rank):
    """200 steps on digits at the same seed."""
    (sparse, gates), (dense, expected) = (learn_gates(latents, lora_rank, form) for form in (False, True))
    assert sparse == dense
    torch.testing.assert_close(gates, expected, rtol=1e-4, atol=1e-6)
    assert gates.std() > 1e-3  # all are equal at first


FORMS = {"train": ["--model", "DiT-T/2"], "prune_by_learning": LEARN, "pairs": [*LEARN, *PAIRS]}


@pytest.mark.parametrize("flags", [["--grad-checkpointing"], ["--compile"]], ids=["checkpointing", "compile"])
@pytest.mark.parametrize("form", FORMS)
def test_same_losses(teacher, latents, tmp_path, run_script, form, flags):
    words, found = ["--load-weight", teacher.weights, *FORMS[form]], {}
    name = "train" if form == "train" else "prune_by_learning"
    for case, extra in (("plain", []), ("flags", flags)):
        (tmp_path / case).mkdir()
        found[case] = losses(run_training(run_script, latents, tmp_path / case, name, *words, *extra)[0])
    torch.testing.assert_close(found["flags"], found["plain"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["train", "prune_by_learning", "train_masked_kd"])
def test_bf16(teacher, student, latents, tmp_path, run_script, name):
    """Another precision, the same run: the loss agrees to bf16's accuracy, the weights stay float32."""
    words = {
        "train": ["--load-weight", student],
        "prune_by_learning": [*LEARN, "--lora", "--load-weight", teacher.weights],
        "train_masked_kd": ["--load-weight", student, "--teacher", "DiT-T/2", "--load-teacher", teacher.weights],
    }[name]
    found = {}
    for precision in ("fp32", "bf16"):
        (tmp_path / precision).mkdir()
        flags = [*words, "--precision", precision]
        rows, state = run_training(run_script, latents, tmp_path / precision, name, *flags)
        found[precision] = losses(rows)
        assert {value.dtype for value in state["ema"].values()} == {torch.float32}
    torch.testing.assert_close(found["bf16"], found["fp32"], rtol=0.05, atol=0)
    assert not torch.equal(found["bf16"], found["fp32"])


class Fixed(nn.Module):
    """A step without random draws: squared outputs of a linear map."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(3, 2)

    def forward(self, x, y):
        return {"loss": (self.net(x) - y[:, None]).square().mean(1)}


def test_accumulated_step_is_the_whole_step():
    weights = []
    for parts in (1, 4):
        step, options = Fixed(), TrainingOptions(grad_accumulation=parts)
        groups = [{"params": list(step.parameters()), "lr": 0.1}]
        trainer = Trainer(Run(device="cpu"), step, groups, step.net, options)
        torch.manual_seed(1)
        for _ in range(3):
            terms = trainer.train_step(torch.randn(8, 3), torch.randn(8))
        weights.append(step.net.weight.detach())
        assert terms["loss"].shape == (8,)
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


class MaskedStep(nn.Module):
    """A network with given masks; `logits` stand for the gates. Label drops are off."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = DiT(4, 2, 2, 16, 4, 2, num_classes=5, class_dropout_prob=0)
        self.logits = nn.Parameter(torch.ones(4))
        for p in self.parameters():
            nn.init.normal_(p, mean=float(p is self.logits), std=0.2 * (p is not self.logits))

    def forward(self, x, mask):
        return self.net(x, torch.zeros(len(x)), torch.ones(len(x), dtype=torch.long), mask=mask * self.logits)


def save_gradients(rank, world, folder):
    """One process's part of a batch; the first layers are kept by no sample of one of two processes."""
    torch.set_num_threads(1)
    step, part = MaskedStep().double(), slice(rank * 4 // world, (rank + 1) * 4 // world)
    x = torch.randn(4, 2, 4, 4).double()
    mask = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 1], [1, 0, 1, 0], [0, 1, 1, 0]]).double()
    wrapped = step
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
        wrapped = DistributedDataParallel(step)
    wrapped(x[part], mask[part])[:, :2].square().mean().backward()
    if rank == 0:
        torch.save({n: p.grad for n, p in step.named_parameters() if p.requires_grad}, f"{folder}/{world}.pt")
    if world > 1:
        dist.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path):
    """Gradients of gates and weights, with layers that one of the processes does not run at all."""
    for world in (1, 2):
        torch.multiprocessing.spawn(save_gradients, (world, str(tmp_path)), nprocs=world)
    one, two = (torch.load(tmp_path / f"{world}.pt") for world in (1, 2))
    assert one.keys() == two.keys()
    for name, expected in one.items():
        assert (two[name] - expected).abs().max() <= 1e-10 * expected.abs().max(), name
