"""What is looked at while a network is trained: its loss on images that were held out, and pictures it draws."""

import time
from dataclasses import dataclass
from functools import cached_property

import torch

from engine.data import TrainingData, network_channels
from engine.distributed import all_reduce, on_main
from engine.errors import InputError, RunError, flag_errors, one_line
from engine.run import Run, seed_everything
from engine.sampling import PictureSampler, preview_labels
from engine.vae import LatentSpace
from families import family_of, model_config

EVALUATION, IMAGES = 2**31, 32  # the first of the seeds of held-out batches, and the size of these


@dataclass(frozen=True)
class Watch:
    """Looks at a network every so many steps, and changes no number of its training: every step seeds itself.

    objective: that the held-out loss is of. own: the family's own flags of kind "sample". The others are settings.
    Raises InputError, when it is made, for flags that do not fit together.
    """

    run: Run
    data: TrainingData
    space: LatentSpace
    objective: object
    own: dict
    model: str
    global_seed: int
    cfg_scale: float
    num_sampling_steps: int
    eval_every: int | None = None
    sample_every: int | None = None
    shard: bool = False

    def __post_init__(self):
        for flag, value in (("--eval-every", self.eval_every), ("--sample-every", self.sample_every)):
            if value and self.shard:
                raise InputError(f"{flag} {value}: needs whole networks, which --shard splits; leave one of them out")
        if self.eval_every and not len(self.data.held_out):
            raise InputError(f"--eval-every {self.eval_every}: needs --eval-split, the images that are held out")
        if self.sample_every:
            self.space.check_codec()
            self._make_sampler()
            held = network_channels(self.data.dataset, self.space)
            if self.space.channels != held:
                raise InputError(
                    f"--vae {self.space.vae}: decodes {self.space.channels} channels, but the latents of --data-path "
                    f"have {held}; take the autoencoder that made them, or leave out --sample-every"
                )

    @cached_property
    def codec(self):
        """The autoencoder, loaded when it is first needed."""
        return self.space.load_codec(self.run.device)

    def is_due(self, step, is_last):
        """Whether there is something to look at."""
        return any(is_due(every, step, is_last) for every in (self.eval_every, self.sample_every))

    def _make_sampler(self):
        family = family_of(self.model)
        with flag_errors("--num-sampling-steps", self.num_sampling_steps):
            sampler = family.make_sampler(self.num_sampling_steps, self.cfg_scale, **self.own)
        with flag_errors("--sample-every", self.sample_every):
            family.check_sampler({**model_config(self.model), "input_size": self.space.size}, **self.own)
        return sampler

    def look(self, step, net, folder, is_last=False):
        """Evaluate `net` and let it draw if it is time; results go to the RunFolder. Returns the seconds it took."""
        start, mode = time.monotonic(), net.training
        net.eval()
        if is_due(self.eval_every, step, is_last):
            loss = self.measure(net)
            folder.log(f"step {step}  held-out loss {loss:.5f}")
            on_main(lambda: folder.write_metrics({"step": step, "held_out_loss": loss}))
        if is_due(self.sample_every, step, is_last):
            on_main(lambda: self._draw(step, net, folder), patient=True)
        net.train(mode)
        return time.monotonic() - start

    @torch.no_grad()
    def measure(self, net):
        """Mean loss of the held-out images, at steps and with noise that are always the same.

        Batches are seeded by their number, so the loss does not depend on how many processes share them.
        """
        images, total = self.data.held_out, torch.zeros((), dtype=torch.float64, device=self.run.device)
        batches = [images[start : start + IMAGES] for start in range(0, len(images), IMAGES)]
        for k in range(self.run.rank, len(batches), self.run.world):
            seed_everything(EVALUATION, self.global_seed, k)
            x, y = (tensor.to(self.run.device) for tensor in self.data.dataset.__getitems__(2 * batches[k]))
            with self.run.autocast():
                draw = self.objective.draw(net, x, y)
                prediction = self.objective.predict(net, x, y, draw)
                total += self.objective.loss(prediction, x, draw)["loss"].double().sum()
        return all_reduce(total).item() / len(images)

    def _draw(self, step, net, folder):
        """A grid of always the same labels and noise, as samples/<step, 7 digits>.png. Trouble is only said."""
        path = folder.path / "samples" / f"{step:07d}.png"
        shape = (net.in_channels, self.space.size, self.space.size)
        sampler = self._make_sampler().to(self.run.device)
        try:
            pictures = PictureSampler(self.run, net, sampler, self.codec, shape)
            pictures.save_grid(path, preview_labels(self.space.num_classes), self.global_seed)
        except (InputError, RunError, RuntimeError) as error:  # torch's is, above all, of memory
            folder.log(f"no picture at step {step}: {one_line(error):.300}")
            return
        folder.show(step, path)


def is_due(every, step, is_last):
    """Whether something that happens every so many steps, and at the end, happens now."""
    return bool(every) and (step % every == 0 or is_last)
