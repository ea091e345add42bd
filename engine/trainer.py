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

from engine.distributed import all_reduce, broadcast, gather, on_main, shared_error
from engine.errors import InputError, RunError
from engine.optim import Ema
from engine.run import checkpoint_blocks, compile_blocks, peak_memory, seed_everything, unfuse_attention
from engine.sharding import clip_gradients, hand_over, put_together, shard_training, take_parts
from engine.signals import StopRequest, stopped


@dataclass(frozen=True)
class TrainingOptions:
    """How a trainer works, whatever it trains; the fields are settings of these names."""

    ema_decay: float = 0.9999
    ema_warmup: bool = False
    clip_norm: float = 1.0
    grad_accumulation: int = 1
    grad_checkpointing: bool = False
    compile: bool | None = None
    log_every: int = 100
    ckpt_every: int = 10000


class Trainer:
    """Optimizes `step.net` on the losses that `step(x, y)` returns.

    groups: parameter groups of AdamW, each with `params` and, without a schedule, `lr`. averaged: the module to keep an
    averaged copy of. schedule: step -> learning rate of all groups; None keeps each group's own.
    """

    def __init__(self, run, step, groups, averaged, options, schedule=None):
        self.run, self.step, self.net, self.options = run, step, step.net, options
        step.to(run.home)
        self.ema, self.schedule = Ema(averaged, options.ema_decay, options.ema_warmup), schedule
        self.watched = self.ema.module if averaged is self.net else self.net
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=run.precision == "fp16")
        self.wrapped, self.replicas, self.steps, self.grad_norm = step, [], 0, 0.0
        if options.grad_checkpointing:
            checkpoint_blocks(self.net)
        if run.precision == "bf16" and not run.on_gpu:
            unfuse_attention(self.net)
        if run.compiles(options.compile):
            compile_blocks(self.net)
        if run.sharded:
            groups, self.replicas = shard_training(step, groups, self.ema, run.device)
        elif run.world > 1:
            # Buffers are tables that never change. The flag that says so was renamed in torch 2.14.
            known = inspect.signature(DistributedDataParallel).parameters
            buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            unused = getattr(self.net, "has_idle_weights", False)
            options = {"gradient_as_bucket_view": True, "find_unused_parameters": unused, buffers: False}
            self.wrapped = DistributedDataParallel(step, **options)
        self.params = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=True)

    def train_step(self, x, y):
        """One optimizer step on a batch; returns the per-sample loss terms (N,), detached."""
        if self.schedule:
            for group in self.optimizer.param_groups:
                group["lr"] = self.schedule(self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.options.grad_accumulation
        batches = list(zip(x.chunk(parts), y.chunk(parts), strict=True))
        rows = [self._backward(*batch, parts, last=k == len(batches) - 1) for k, batch in enumerate(batches)]
        hand_over(self.replicas)
        self.scaler.unscale_(self.optimizer)
        clip = clip_gradients if self.run.sharded else torch.nn.utils.clip_grad_norm_
        self.grad_norm = clip(self.params, self.options.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.ema.update(self.steps)
        self.steps += 1
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _backward(self, x, y, parts, last):
        """Add the gradients of one part of the batch; processes exchange them with the last part only."""
        alone = nullcontext() if last or self.wrapped is self.step else self.wrapped.no_sync()
        if self.run.sharded:
            self.step.set_requires_gradient_sync(last)
        with alone:
            with self.run.autocast():
                terms = self.wrapped(x, y)
            self.scaler.scale(terms["loss"].mean() / parts).backward()
        return {name: term.detach() for name, term in terms.items()}

    def fit(self, data, folder, before_step=None, report=None, watch=None):
        """Train to the end of `data`, a TrainingData, from where the state of the prepared RunFolder stands.

        before_step(step) sets what changes with the step. report(step) -> (lines, metrics) adds to every log entry.
        watch: an engine.watch.Watch of the averaged network, or of the trained one where not all of it is averaged.
        Raises RunError on all processes when a number is not finite or a file cannot be written, and StoppedError, with
        the state saved, when one was told to stop.
        """
        try:
            meter = Meter(self.run, data)
            self.resume(folder, meter)
            on_main(folder.write_config)
            on_main(lambda: folder.drop_metrics_after(self.steps if folder.continued else -1))
            if self.steps >= data.total_steps:
                folder.log(
                    f"nothing left to train: {self.steps} of {data.total_steps} steps are done, the last state is in "
                    f"{folder.path}"
                )
                return
            if self.steps == 0:
                self._log(meter, folder, report)
                self._look(watch, meter, folder)
            with StopRequest() as stop:
                self._train(data, folder, meter, stop, before_step, report, watch)
        finally:
            folder.close()

    def _train(self, data, folder, meter, stop, before_step, report, watch):
        """The steps that are left."""
        total, options = data.total_steps, self.options
        batches = data.batches(range(self.steps, total), self.run.rank, self.run.world, self.run.on_gpu)
        with tqdm(
            total=total, initial=self.steps, disable=not self.run.is_main, desc=folder.path.name, leave=False
        ) as bar:
            for x, y in batches:
                x, y = (tensor.to(self.run.device, non_blocking=True) for tensor in (x, y))
                if before_step:
                    before_step(self.steps)
                # All draws of a step, here and inside the network, are functions of (seed, step, rank).
                seed_everything(data.global_seed, self.steps, self.run.rank)
                terms = self.train_step(x, y)
                meter.add(terms, self.steps, None if self.scaler.is_enabled() else self.grad_norm)
                bar.update()
                signal, is_last = stop.agreed(self.steps), self.steps == total
                if self.steps % options.log_every == 0 or is_last:
                    self._log(meter, folder, report)
                if self.steps % options.ckpt_every == 0 or is_last or signal:
                    self._save(meter, folder)
                if signal and not is_last:
                    raise shared_error(stopped(signal, self.steps))
                self._look(watch, meter, folder, is_last)

    def _log(self, meter, folder, report):
        lr = self.schedule(self.steps) if self.schedule else self.optimizer.param_groups[-1]["lr"]
        row, line = meter.flush(self.steps, lr, float(self.grad_norm))
        if line:
            folder.log(line)
        lines, metrics = report(self.steps) if report else ([], {})
        for text in lines:
            folder.log(text)
        if row or metrics:
            on_main(lambda: folder.write_metrics({"step": self.steps, **row, **metrics}))

    def _look(self, watch, meter, folder, is_last=False):
        """Look at the network if it is time, which does not count as time of training."""
        if watch and watch.is_due(self.steps, is_last):
            meter.check_finite()
            meter.start += watch.look(self.steps, self.watched, folder, is_last)

    def _save(self, meter, folder):
        """Write a state, in the main process, unless something in it is not finite."""
        meter.check_finite()
        state = {**self.state_dict(), "meter": meter.gather()}

        def save():
            check_finite(state, self.steps)
            folder.save_state(state)

        on_main(save, patient=True)

    def gather_weights(self):
        """The state dict of the network, whole in the main process; all have to call this."""
        return put_together(self.net.state_dict())

    def state_dict(self):
        """The training state, tensors and plain values, whole in the main process; all have to call this."""
        return {
            "model": self.gather_weights(),
            "ema": put_together(self.ema.module.state_dict()),
            "opt": put_together(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "train_steps": self.steps,
            "world": self.run.world,
        }

    def resume(self, folder, meter):
        """Continue from the state that the main process's folder has chosen, if there is one: it is sent to all."""
        state, folder.state = broadcast(folder.state), None
        if state is None:
            return
        asked = [{key: group[key] for key in group if key != "params"} for group in self.optimizer.param_groups]
        try:
            self.net.load_state_dict(take_parts(state["model"], self.net.state_dict()))
            self.ema.module.load_state_dict(take_parts(state["ema"], self.ema.module.state_dict()))
            averages = take_parts(state["opt"]["state"], dict(enumerate(self.params)))
            self.optimizer.load_state_dict({**state["opt"], "state": averages})
            if state.get("scaler"):  # a run in another precision has none: start with a new one
                self.scaler.load_state_dict(state["scaler"])
            meter.load(state.get("meter"))
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise shared_error(
                InputError(
                    f"--resume {folder.continued}: not a training state of this model ({reason}); take another file"
                )
            ) from None
        for group, options in zip(self.optimizer.param_groups, asked, strict=True):
            group.update(options)  # rates and the like are those of the command line, not of the state
        self.steps = state["train_steps"]
        folder.log(f"resumed from {folder.continued} at step {self.steps}")
        if state.get("world", self.run.world) != self.run.world:
            folder.log(
                f"note: that state is of {state['world']} process(es), now there are {self.run.world}: the batches are "
                "the same, random draws are not"
            )


def check_finite(state, step):
    """Raise RunError if a tensor of a training state holds NaN or infinity."""
    for entry in ("model", "ema", "opt"):
        for key, value in named_tensors(state[entry]):
            if value.is_floating_point() and not value.isfinite().all():
                raise RunError(
                    f"{key} in {entry} is not finite after step {step}, and that state is not saved; lower --lr or "
                    "take another --precision, and continue from the last one"
                )


def named_tensors(value, name=""):
    """(name, tensor) of all tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from named_tensors(inner, f"{name}.{key}" if name else str(key))


class Meter:
    """Means of the loss terms over a log interval and all processes, kept on the device until they are shown."""

    def __init__(self, run, data):
        self.run, self.data = run, data
        self.sums, self.count, self.timed, self.start = {}, 0, 0, time.monotonic()
        self.first_bad = torch.tensor(float("inf"), device=run.device)
        self.bad_rows = torch.tensor(0, device=run.device)

    def add(self, terms, step, grad_norm=None):
        """Take in the per-sample terms of a step, counted from 1, and the gradient's norm if that has to be finite."""
        for name, term in terms.items():
            self.sums[name] = self.sums.get(name, 0) + term.float().mean()
        rows = terms["loss"].isfinite().logical_not()
        bad = rows.any() if grad_norm is None else rows.any() | torch.isfinite(grad_norm).logical_not()
        is_first = bad & torch.isinf(self.first_bad)
        self.bad_rows = torch.where(is_first, rows, self.bad_rows)
        self.first_bad = torch.where(is_first, float(step), self.first_bad)
        self.count += 1
        self.timed += 1  # not those of before a restart

    def check_finite(self):
        """Raise RunError on all processes if a loss or a gradient was not finite on one."""
        step = all_reduce(self.first_bad.clone(), "min").item()
        if not math.isfinite(step):
            return
        mine = self.first_bad.item() == step
        found = gather(self._name_bad_pictures(int(step)) if mine else None)
        # The sum of gradients brings what is not finite to all processes: the one that has a picture is meant.
        bad = [k for k, pictures in enumerate(found) if pictures is not None]
        rank = next((k for k in bad if found[k]), bad[0])
        what = f"loss of images {found[rank]} of --data-path is" if found[rank] else "gradient is"
        raise shared_error(
            RunError(
                f"the {what} not finite at step {int(step)} in process {rank}; see whether these data are damaged, "
                "lower --lr or take --precision bf16 or fp32"
            )
        )

    def _name_bad_pictures(self, step):
        """Numbers of the first images whose loss was not finite at this step."""
        if not self.bad_rows.ndim:
            return []
        (items,) = self.data.order([step - 1], self.run.rank, self.run.world)
        images = [item // 2 for item, bad in zip(items, self.bad_rows.tolist(), strict=True) if bad]
        return self.data.dataset.name_images(images[:10])

    def gather(self):
        """What is measured since the last row, of all processes, for a training state."""
        return {"count": self.count, "sums": gather({name: value.cpu() for name, value in self.sums.items()})}

    def load(self, measured):
        """Go on from there; with other processes than before, each takes its share of the sum."""
        if not measured or not measured["count"]:
            return
        self.count, sums = measured["count"], measured["sums"]
        if len(sums) == self.run.world:
            mine = sums[self.run.rank]
        else:
            mine = {name: sum(each[name] for each in sums) / len(sums) for name in sums[0]}
        self.sums = {name: value.to(self.run.device) for name, value in mine.items()}

    def flush(self, step, lr, grad_norm):
        """({name: number}, log line) of the interval, and start the next; empty before the first step.

        Raises RunError if a number was not finite.
        """
        if not self.count:
            return {}, ""
        self.check_finite()
        means = all_reduce(torch.stack(list(self.sums.values()))) / (self.count * self.run.world)
        row = dict(zip(self.sums, means.tolist(), strict=True))
        rate = self.timed / (time.monotonic() - self.start)
        total, batch = self.data.total_steps, self.data.global_batch_size
        left = timedelta(seconds=round((total - step) / rate))
        losses = " ".join(f"{name} {value:.4f}" for name, value in row.items())
        memory = peak_memory(self.run.device)
        shown = "" if memory is None else f"{memory:.2f} GB  "
        line = (
            f"step {step}/{total}  {losses}  grad {grad_norm:.3f}  lr {lr:.3g}  "
            f"{rate * batch:.1f} images/s  {shown}left {left}"
        )
        row |= {"lr": lr, "grad_norm": grad_norm, "images_per_second": rate * batch}
        row |= {} if memory is None else {"memory_gb": memory}
        self.sums, self.count, self.timed, self.start = {}, 0, 0, time.monotonic()
        return row, line
