r"""Recover a pruned network by Masked KD: distil outputs and hidden states, leaving out extreme activations.

torchrun --nnodes=1 --nproc_per_node=8 train_masked_kd.py --model DiT-D14/2 --load-weight pruned.pt \
    --data-path features --epochs 100 --teacher DiT-XL/2 --load-teacher pretrained/DiT-XL-2-256x256.pt
"""

from engine.cli import (
    TRAINING_FLAGS,
    add_unused,
    amount,
    flag_type,
    launch,
    make_parser,
    model_name,
    parse,
    report_unused,
    share,
)
from engine.data import open_latents, told_by_inputs
from engine.errors import InputError, blame
from engine.run import Run
from engine.trainer import Trainer, start_network
from families import family_of, stack_layers
from pruning.distillation import DistillStep, even_groups, feature_weight, layer_pairs
from pruning.patterns import check_borders, parse_pattern


def parse_args(argv=None):
    parser = make_parser("train_masked_kd", __doc__, TRAINING_FLAGS + " lr min-lr", "train", num_workers=8)
    parser.add_argument("--teacher", type=flag_type(model_name), default="DiT-XL/2", help="network of the teacher")
    parser.add_argument("--load-teacher", help="weights of the teacher")
    parser.add_argument("--pattern", help="N:M groups that pair the layers, e.g. 2:4x7 (default: see README)")
    parser.add_argument(
        "--alpha", type=share, default=0.9, help="weight of output distillation; the loss gets the rest"
    )
    parser.add_argument("--beta", type=amount, default=1e-2, help="weight of the feature loss in the first epoch")
    parser.add_argument(
        "--mask-threshold", type=amount, default=2.0, help="extreme: beyond so many standard deviations"
    )
    add_unused(parser, strong_aug={"action": "store_true"})
    return parse(parser, argv, told_by_inputs)


def pair_layers(args, facts):
    """Pairs by --pattern; else evenly; else by the pattern recorded with the weights or known of the release."""
    family = family_of(args.model)
    if family_of(args.teacher) is not family:
        raise InputError(f"--teacher {args.teacher}: is no {family.name}, but --model {args.model} is; take one")
    student, teacher = stack_layers(args.model), stack_layers(args.teacher)
    even = all(t % s == 0 for s, t in zip(student, teacher, strict=True))
    text = args.pattern or (None if even else facts.get("pattern") or family.patterns.get(args.model))
    with blame("--pattern", text or f"for --model {args.model} and --teacher {args.teacher}"):
        groups = parse_pattern(text, sum(teacher)) if text else even_groups(student, teacher)
        check_borders(groups, teacher)
        return layer_pairs(sum(student), sum(teacher), groups)


def main(args):
    report_unused(args)
    if not args.load_teacher:
        raise InputError("--load-teacher: missing; give the weights of the network to learn from")
    dataset, config = open_latents(args)
    net, facts = start_network(args, config)
    pairs = pair_layers(args, facts)
    teacher, _ = start_network(args, config, args.teacher, args.load_teacher, "--load-teacher", "--teacher")

    run = Run(args, default_precision="fp16")
    run.open_folder()
    net = net(run.device)
    teacher, objective = run.freeze(teacher(run.device)), family_of(args.model).objective(args)
    step = DistillStep(net, teacher, objective, pairs, args.alpha, args.beta, args.mask_threshold)
    steps_per_epoch = len(dataset) // args.global_batch_size
    total_steps = args.epochs * steps_per_epoch
    trainer = Trainer.for_recovery(run, step.to(run.device), args, total_steps, facts)

    def before_step(k):
        step.beta = feature_weight(args.beta, k // steps_per_epoch, args.epochs)

    run.log(f"layer pairs (student, teacher): {pairs}")
    trainer.fit(dataset, args, total_steps, before_step, lambda k: ([], {"beta": step.beta}))


if __name__ == "__main__":
    launch(main, parse_args)
