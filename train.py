r"""Train or fine-tune a network on encoded latents.

torchrun --nnodes=1 --nproc_per_node=8 train.py --model DiT-D14/2 --load-weight pruned.pt \
    --data-path features --epochs 100
"""

from diffusion.objectives import TrainStep
from engine.cli import add_unused, launch, make_parser, parse, report_unused
from engine.data import open_latents, told_by_inputs
from engine.run import Run
from engine.trainer import Trainer, cosine_schedule, start_network
from families import family_of


def parse_args(argv=None):
    parser = make_parser(
        __doc__,
        "data-path results-dir model image-size num-classes epochs global-batch-size global-seed vae num-workers "
        "log-every ckpt-every resume load-weight prefix ema-decay lr min-lr clip-norm mirror precision device",
    )
    add_unused(parser, strict={"action": "store_true"})
    return parse(parser, argv, told_by_inputs)


def main(args):
    report_unused(args)
    dataset, config = open_latents(args)
    net, facts = start_network(args, config)

    run = Run(args, default_precision="fp16")
    run.open_folder()
    net = net(run.device)
    step = TrainStep(net, family_of(args.model).objective(args)).to(run.device)
    total_steps = args.epochs * (len(dataset) // args.global_batch_size)
    trainer = Trainer(
        run,
        step,
        [{"params": [p for p in net.parameters() if p.requires_grad]}],
        averaged=net,
        ema_decay=args.ema_decay,
        clip_norm=args.clip_norm,
        schedule=cosine_schedule(args.lr, args.min_lr, total_steps),
        facts=facts,
    )
    trainer.fit(dataset, args, total_steps)


if __name__ == "__main__":
    launch(main, parse_args)
