r"""Train or fine-tune a network on encoded latents.

Example:
  torchrun --nnodes=1 --nproc_per_node=8 train.py --model DiT-D14/2 --load-weight pruned.pt --data-path features \
      --epochs 100
"""

from engine.cli import Command, launch, unused_flags
from engine.flags import LORA_FLAGS, PREVIEW, TRAINING_FLAGS, shared

COMMAND = Command(
    "train",
    __doc__,
    shared=(*shared(f"{TRAINING_FLAGS} lr min-lr weight-decay betas warmup-epochs", **PREVIEW), *LORA_FLAGS),
    kinds=("train", "sample"),
    weights=(("load_weight", "model"),),
    latents=True,
    scratch=True,
    precision="fp16",
    unused=unused_flags(strict=False),
)
parse_args = COMMAND.resolve


def main(settings):
    from diffusion.objectives import TrainStep
    from engine.data import network_config
    from engine.endings import say_next
    from engine.networks import NetworkStart, StateSketch, add_adapters
    from engine.optim import Recipe
    from engine.start import make_run, make_watch, open_data, start_training
    from engine.trainer import Trainer, TrainingOptions

    run = make_run(settings, COMMAND)
    family = settings.family
    space, data = open_data(settings)
    watch = make_watch(settings, run, data, space)
    start = NetworkStart(settings.model, network_config(data.dataset, space), settings.weights.get("load_weight"))
    sketch, networks = add_adapters(start.build_without_memory(), settings, run.precision), {"network": start}
    folder = start_training(settings, run, data, networks, StateSketch(sketch, sketch), start.describe(space))
    if folder is None:
        return

    net = start.build(run.home, run.precision if settings.lora else "fp32")
    add_adapters(net, settings, run.precision)
    step = TrainStep(net, settings.make_objective())
    recipe, options = settings.make(Recipe), settings.make(TrainingOptions)
    groups, schedule = recipe.groups(net, family.no_decay), recipe.schedule(data.total_steps)
    trainer = Trainer(run, step, groups, net, options, schedule)
    trainer.fit(data, folder, watch=watch)
    say_next(run, "sample", ckpt=folder.state_path(data.total_steps), **settings.family.sample_hint)


if __name__ == "__main__":
    launch(main, parse_args)
