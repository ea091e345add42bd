"""The loop that all training scripts share; what differs between them is the step they train."""

import copy
import inspect
import math
import time
from contextlib import nullcontext
from datetime import timedelta

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from engine.checkpoint import build_network, check_fit, read_facts, read_file, read_weights, save_state
from engine.data import latent_loader
from engine.distributed import all_reduce
from engine.errors import InputError, RunError
from engine.run import peak_memory, seed_everything
from families import block_stacks, create_model, family_of, model_config


def cosine_schedule(lr, min_lr, total_steps, warmup_steps=0):
    """Learning rate as a function of the step: up to `lr` in `warmup_steps`, then along a cosine to `min_lr`."""

    def rate(step):
        if step < warmup_steps:
            return lr * step / warmup_steps
        way = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * min(way, 1))) / 2

    return rate


def decay_groups(net, weight_decay, exempt):
    """Parameter groups of AdamW: vectors, biases and what has a part of `exempt` in its name do not decay."""
    groups = {True: [], False: []}
    for name, p in net.named_parameters():
        if p.requires_grad:
            groups[p.ndim > 1 and not name.endswith(".bias") and not any(word in name for word in exempt)].append(p)
    if not weight_decay:
        return [{"params": [p for p in net.parameters() if p.requires_grad]}]
    return [{"params": params, "weight_decay": weight_decay * decays} for decays, params in groups.items() if params]


def start_network(args, config, name=None, path=None, flag="--load-weight", option="--model"):
    """Check the weights to start from, before anything runs: (device -> network, facts to record with its weights).

    Without a file the network starts from its initial weights. `config`: constructor arguments from the data.
    Raises InputError if the file does not fit, or if the model is gated but `config` has no groups.
    """
    name, path = (name, path) if name else (args.model, args.load_weight)
    if "groups" in model_config(name) and "groups" not in config:
        raise InputError(f"{option} {name}: has gates; take a plain name, or prune_by_learning.py to learn them")
    facts = {"model": name, "num_classes": args.num_classes, "vae": args.vae, "source": path}
    facts |= {key: value for key, value in (read_facts(path) if path else {}).items() if key in ("kept", "pattern")}
    if not path:
        return lambda device: create_model(name, **config).to(device), facts
    state = read_weights(path, flag)
    check_fit(state, flag, path, name, option, **config)
    return lambda device: build_network(name, state, device, **config), facts


class Ema:
    """Averaged copy of a module, over the parameters that are trained; the others stay as they are."""

    def __init__(self, module, decay):
        self.decay, self.module = decay, copy.deepcopy(module).requires_grad_(False).eval()
        trained = {name for name, p in module.named_parameters() if p.requires_grad}
        self.live = [p for name, p in module.named_parameters() if name in trained]
        self.averages = [p for name, p in self.module.named_parameters() if name in trained]

    @torch.no_grad()
    def update(self):
        torch._foreach_mul_(self.averages, self.decay)
        torch._foreach_add_(self.averages, self.live, alpha=1 - self.decay)


class Trainer:
    """Optimizes `step.net` on the losses that `step(x, y)` returns.

    groups: parameter groups of AdamW, each with `params` and `lr`. averaged: the module to keep an averaged copy of.
    args: ema_decay, clip_norm, compile, grad_checkpointing and grad_accumulation.
    schedule: step -> learning rate of all groups; None keeps each group's own.
    facts: to record with the checkpoints.
    """

    def __init__(self, run, step, groups, averaged, args, schedule=None, facts=None):
        self.run, self.step, self.net = run, step, step.net
        self.params = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=True)
        self.ema, self.clip_norm, self.schedule = Ema(averaged, args.ema_decay), args.clip_norm, schedule
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=run.precision == "fp16")
        self.wrapped, self.steps, self.grad_norm, self.facts = step, 0, 0.0, facts or {}
        self.parts = args.grad_accumulation
        for stack in block_stacks(step.net):
            stack.checkpointing = args.grad_checkpointing
        run.compile(step.net)
        if run.world > 1:
            # Buffers are tables that never change. The flag that says so was renamed in torch 2.14.
            known = inspect.signature(DistributedDataParallel).parameters
            buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            self.wrapped = DistributedDataParallel(step, gradient_as_bucket_view=True, **{buffers: False})

    @classmethod
    def for_recovery(cls, run, step, args, total_steps, facts):
        """All weights of step.net, along the cosine from --lr to --min-lr."""
        groups = decay_groups(step.net, getattr(args, "weight_decay", 0.0), family_of(args.model).no_decay)
        for group in groups:
            group["betas"] = tuple(getattr(args, "betas", (0.9, 0.999)))
        warmup = total_steps * getattr(args, "warmup_epochs", 0) // args.epochs
        schedule = cosine_schedule(args.lr, args.min_lr, total_steps, warmup)
        return cls(run, step, groups, step.net, args, schedule, facts)

    def train_step(self, x, y):
        """One optimizer step on a batch; returns the per-sample loss terms (N,), detached."""
        if self.schedule:
            for group in self.optimizer.param_groups:
                group["lr"] = self.schedule(self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        parts = list(zip(x.chunk(self.parts), y.chunk(self.parts), strict=True))
        rows = [self._backward(*part, last=k == len(parts) - 1) for k, part in enumerate(parts)]
        self.scaler.unscale_(self.optimizer)
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.params, self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.ema.update()
        self.steps += 1
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _backward(self, x, y, last):
        """Add the gradients of one part of the batch; processes exchange them with the last part only."""
        alone = nullcontext() if last or self.wrapped is self.step else self.wrapped.no_sync()
        with alone:
            with self.run.autocast():
                terms = self.wrapped(x, y)
            self.scaler.scale(terms["loss"].mean() / self.parts).backward()
        return {name: term.detach() for name, term in terms.items()}

    def fit(self, dataset, args, total_steps, before_step=None, report=None):
        """Train to `total_steps`, from where the run folder's newest state stands; save at the end.

        before_step(step) sets what changes with the step. report(step) -> (lines, metrics) adds to every log entry.
        Raises RunError on all processes when a loss is not finite.
        """
        self.resume()
        meter = Meter(self.run, total_steps, args.global_batch_size)
        if self.steps == 0:
            self._log(meter, report)
        loader = latent_loader(dataset, args, self.run, range(self.steps, total_steps))
        bar = tqdm(total=total_steps, initial=self.steps, disable=not self.run.is_main, desc=args.model, leave=False)
        for x, y in loader:
            x, y = (tensor.to(self.run.device, non_blocking=True) for tensor in (x, y))
            if before_step:
                before_step(self.steps)
            # All draws of a step, here and inside the network, are functions of (seed, step, rank).
            seed_everything(args.global_seed, self.steps, self.run.rank)
            meter.add(self.train_step(x, y), self.steps)
            bar.update()
            if self.steps % args.log_every == 0 or self.steps == total_steps:
                self._log(meter, report)
            if self.steps % args.ckpt_every == 0 or self.steps == total_steps:
                meter.check_finite()
                self.save()
        bar.close()

    def _log(self, meter, report):
        lr = self.schedule(self.steps) if self.schedule else self.optimizer.param_groups[-1]["lr"]
        row = meter.flush(self.steps, lr, float(self.grad_norm))
        lines, metrics = report(self.steps) if report else ([], {})
        for line in lines:
            self.run.log(line)
        if row or metrics:
            self.run.write_metrics({"step": self.steps, **(row or {}), **metrics})

    def save(self):
        """Write the training state to <folder>/checkpoints/<step, 7 digits>.pt; its `ema` can be sampled from."""
        if not self.run.is_main:
            return
        state = {
            "model": self.net.state_dict(),
            "ema": self.ema.module.state_dict(),
            "opt": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "train_steps": self.steps,
            "args": self.run.config,
        }
        path = self.run.folder / "checkpoints" / f"{self.steps:07d}.pt"
        save_state(path, state, **self.facts)
        self.run.log(f"saved {path}")

    def resume(self):
        """Continue from --resume or the newest state of the run folder, if there is one."""
        path = self.run.newest_state()
        if path is None:
            return
        state = read_file(path, "--resume")
        try:
            self.net.load_state_dict(state["model"])
            self.ema.module.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["opt"])
            self.scaler.load_state_dict(state.get("scaler", {}))
            self.steps = state["train_steps"]
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"--resume {path}: no training state of this model ({reason}); take another file"
            ) from None
        self.run.drop_metrics_after(self.steps)
        self.run.log(f"resumed from {path} at step {self.steps}")


class Meter:
    """Means of the loss terms over a log interval and all processes, kept on the device until they are shown."""

    def __init__(self, run, total_steps, batch):
        self.run, self.total_steps, self.batch = run, total_steps, batch
        self.sums, self.count, self.start = {}, 0, time.monotonic()
        self.first_bad = torch.tensor(float("inf"), device=run.device)

    def add(self, terms, step):
        for name, term in terms.items():
            self.sums[name] = self.sums.get(name, 0) + term.float().mean()
        bad = torch.isfinite(terms["loss"].sum()).logical_not()
        self.first_bad = torch.where(bad & (self.first_bad > step), float(step), self.first_bad)
        self.count += 1

    def check_finite(self):
        step = all_reduce(self.first_bad.clone(), "min").item()
        if math.isfinite(step):
            raise RunError(f"the loss is not finite at step {int(step)}; lower --lr or take --precision bf16 or fp32")

    def flush(self, step, lr, grad_norm):
        """Log one line and return its numbers; None before the first step. Raises RunError if a loss was not finite."""
        if not self.count:
            return None
        self.check_finite()
        means = all_reduce(torch.stack(list(self.sums.values()))) / (self.count * self.run.world)
        row = dict(zip(self.sums, means.tolist(), strict=True))
        seconds = time.monotonic() - self.start
        rate = self.count / seconds
        left = timedelta(seconds=round((self.total_steps - step) / rate))
        losses = " ".join(f"{name} {value:.4f}" for name, value in row.items())
        self.run.log(
            f"step {step}/{self.total_steps}  {losses}  grad {grad_norm:.3f}  lr {lr:.3g}  "
            f"{rate * self.batch:.1f} images/s  {peak_memory(self.run.device):.2f} GB  left {left}"
        )
        row |= {"lr": lr, "grad_norm": grad_norm, "images_per_second": rate * self.batch}
        self.sums, self.count, self.start = {}, 0, time.monotonic()
        return row
