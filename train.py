r"""Train or fine-tune a network on encoded latents.

torchrun --nnodes=1 --nproc_per_node=8 train.py --model DiT-D14/2 --load-weight pruned.pt \
    --data-path features --epochs 100
"""

from diffusion.objectives import TrainStep
from engine.cli import TRAINING_FLAGS, add_unused, launch, make_parser, parse, report_unused
from engine.data import open_latents, told_by_inputs
from engine.run import Run
from engine.trainer import Trainer, start_network
from families import family_of


def parse_args(argv=None):
    parser = make_parser("train", __doc__, TRAINING_FLAGS + " lr min-lr weight-decay betas warmup-epochs", "train")
    add_unused(parser, strict={"action": "store_true"})
    return parse(parser, argv, told)


def told(args):
    """What the inputs tell; without weights to start from, also the family's own settings of training from scratch."""
    return told_by_inputs(args) | ({} if args.load_weight else family_of(args.model).plain)


def main(args):
    report_unused(args)
    dataset, config = open_latents(args)
    net, facts = start_network(args, config)

    run = Run(args, default_precision="fp16")
    run.open_folder()
    net = net(run.device)
    step = TrainStep(net, family_of(args.model).objective(args)).to(run.device)
    total_steps = args.epochs * (len(dataset) // args.global_batch_size)
    trainer = Trainer.for_recovery(run, step, args, total_steps, facts)
    trainer.fit(dataset, args, total_steps)


if __name__ == "__main__":
    launch(main, parse_args)
