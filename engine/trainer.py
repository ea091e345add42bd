"""The loop that all training scripts share; what differs between them is the step they train."""

import inspect
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from engine.checkpoint import read_state
from engine.distributed import all_reduce
from engine.errors import InputError, RunError
from engine.optim import Ema
from engine.run import checkpoint_blocks, compile_blocks, peak_memory, seed_everything


@dataclass(frozen=True)
class TrainingOptions:
    """How a trainer works, whatever it trains; the fields are settings of these names."""

    ema_decay: float = 0.9999
    ema_warmup: bool = False
    clip_norm: float = 1.0
    grad_accumulation: int = 1
    grad_checkpointing: bool = False
    compile: bool = False
    log_every: int = 100
    ckpt_every: int = 10000


class Trainer:
    """Optimizes `step.net` on the losses that `step(x, y)` returns.

    groups: parameter groups of AdamW, each with `params` and, without a schedule, `lr`. averaged: the module to keep an
    averaged copy of. schedule: step -> learning rate of all groups; None keeps each group's own.
    """

    def __init__(self, run, step, groups, averaged, options, schedule=None):
        self.run, self.step, self.net, self.options = run, step, step.net, options
        self.params = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=True)
        self.ema, self.schedule = Ema(averaged, options.ema_decay, options.ema_warmup), schedule
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=run.precision == "fp16")
        self.wrapped, self.steps, self.grad_norm = step, 0, 0.0
        if options.grad_checkpointing:
            checkpoint_blocks(self.net)
        if options.compile:
            compile_blocks(self.net)
        if run.world > 1:
            # Buffers are tables that never change. The flag that says so was renamed in torch 2.14.
            known = inspect.signature(DistributedDataParallel).parameters
            buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            self.wrapped = DistributedDataParallel(step, gradient_as_bucket_view=True, **{buffers: False})

    def train_step(self, x, y):
        """One optimizer step on a batch; returns the per-sample loss terms (N,), detached."""
        if self.schedule:
            for group in self.optimizer.param_groups:
                group["lr"] = self.schedule(self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.options.grad_accumulation
        batches = list(zip(x.chunk(parts), y.chunk(parts), strict=True))
        rows = [self._backward(*batch, parts, last=k == len(batches) - 1) for k, batch in enumerate(batches)]
        self.scaler.unscale_(self.optimizer)
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.params, self.options.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.ema.update(self.steps)
        self.steps += 1
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _backward(self, x, y, parts, last):
        """Add the gradients of one part of the batch; processes exchange them with the last part only."""
        alone = nullcontext() if last or self.wrapped is self.step else self.wrapped.no_sync()
        with alone:
            with self.run.autocast():
                terms = self.wrapped(x, y)
            self.scaler.scale(terms["loss"].mean() / parts).backward()
        return {name: term.detach() for name, term in terms.items()}

    def fit(self, data, folder, before_step=None, report=None):
        """Train to the end of `data`, a TrainingData, from where the newest state of the RunFolder stands.

        before_step(step) sets what changes with the step. report(step) -> (lines, metrics) adds to every log entry.
        Raises RunError on all processes when a loss is not finite.
        """
        self.resume(folder)
        folder.write_config()
        total, options = data.total_steps, self.options
        if self.steps >= total:
            folder.log(f"nothing left to train: {total} of {total} steps are done, the last state is in {folder.path}")
            return
        meter = Meter(self.run, total, data.global_batch_size)
        if self.steps == 0:
            self._log(meter, folder, report)
        batches = data.batches(range(self.steps, total), self.run.rank, self.run.world, self.run.pins_memory)
        with tqdm(
            total=total, initial=self.steps, disable=not self.run.is_main, desc=folder.path.name, leave=False
        ) as bar:
            for x, y in batches:
                x, y = (tensor.to(self.run.device, non_blocking=True) for tensor in (x, y))
                if before_step:
                    before_step(self.steps)
                # All draws of a step, here and inside the network, are functions of (seed, step, rank).
                seed_everything(data.global_seed, self.steps, self.run.rank)
                meter.add(self.train_step(x, y), self.steps)
                bar.update()
                if self.steps % options.log_every == 0 or self.steps == total:
                    self._log(meter, folder, report)
                if self.steps % options.ckpt_every == 0 or self.steps == total:
                    meter.check_finite()
                    if self.run.is_main:
                        folder.save_state(self.state_dict())

    def _log(self, meter, folder, report):
        lr = self.schedule(self.steps) if self.schedule else self.optimizer.param_groups[-1]["lr"]
        row, line = meter.flush(self.steps, lr, float(self.grad_norm))
        if line:
            folder.log(line)
        lines, metrics = report(self.steps) if report else ([], {})
        for text in lines:
            folder.log(text)
        if row or metrics:
            folder.write_metrics({"step": self.steps, **row, **metrics})

    def state_dict(self):
        """The training state: tensors and plain values."""
        return {
            "model": self.net.state_dict(),
            "ema": self.ema.module.state_dict(),
            "opt": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "train_steps": self.steps,
        }

    def resume(self, folder):
        """Continue from the state that the folder gives, if there is one."""
        path = folder.newest_state()
        if path is None:
            return
        state = read_state(path)
        asked = [{key: group[key] for key in group if key != "params"} for group in self.optimizer.param_groups]
        try:
            self.net.load_state_dict(state["model"])
            self.ema.module.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["opt"])
            if state.get("scaler"):  # a run in another precision has none: start with a new one
                self.scaler.load_state_dict(state["scaler"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"--resume {path}: not a training state of this model ({reason}); take another file"
            ) from None
        for group, options in zip(self.optimizer.param_groups, asked, strict=True):
            group.update(options)  # rates and the like are those of the command line, not of the state
        self.steps = state["train_steps"]
        folder.drop_metrics_after(self.steps)
        folder.log(f"resumed from {path} at step {self.steps}")


class Meter:
    """Means of the loss terms over a log interval and all processes, kept on the device until they are shown."""

    def __init__(self, run, total_steps, batch):
        self.run, self.total_steps, self.batch = run, total_steps, batch
        self.sums, self.count, self.start = {}, 0, time.monotonic()
        self.first_bad = torch.tensor(float("inf"), device=run.device)

    def add(self, terms, step):
        """Take in the per-sample terms of a step."""
        for name, term in terms.items():
            self.sums[name] = self.sums.get(name, 0) + term.float().mean()
        bad = torch.isfinite(terms["loss"].sum()).logical_not()
        self.first_bad = torch.where(bad & (self.first_bad > step), float(step), self.first_bad)
        self.count += 1

    def check_finite(self):
        """Raise RunError on all processes if a loss was not finite on one."""
        step = all_reduce(self.first_bad.clone(), "min").item()
        if math.isfinite(step):
            raise RunError(f"the loss is not finite at step {int(step)}; lower --lr or take --precision bf16 or fp32")

    def flush(self, step, lr, grad_norm):
        """({name: number}, log line) of the interval, and start the next; empty before the first step.

        Raises RunError if a loss was not finite.
        """
        if not self.count:
            return {}, ""
        self.check_finite()
        means = all_reduce(torch.stack(list(self.sums.values()))) / (self.count * self.run.world)
        row = dict(zip(self.sums, means.tolist(), strict=True))
        rate = self.count / (time.monotonic() - self.start)
        left = timedelta(seconds=round((self.total_steps - step) / rate))
        losses = " ".join(f"{name} {value:.4f}" for name, value in row.items())
        memory = peak_memory(self.run.device)
        shown = "" if memory is None else f"{memory:.2f} GB  "
        line = (
            f"step {step}/{self.total_steps}  {losses}  grad {grad_norm:.3f}  lr {lr:.3g}  "
            f"{rate * self.batch:.1f} images/s  {shown}left {left}"
        )
        row |= {"lr": lr, "grad_norm": grad_norm, "images_per_second": rate * self.batch}
        self.sums, self.count, self.start = {}, 0, time.monotonic()
        return row, line
