r"""Learn which layers to keep, then cut the others out of the original weights.

torchrun --nnodes=1 --nproc_per_node=8 prune_by_learning.py --model DiT-XL-1-2 \
    --load-weight pretrained/DiT-XL-2-256x256.pt --data-path features --epochs 1 --global-batch-size 128 \
    --delta-w --lora --save-model pruned.pt
"""

import os

from diffusion.objectives import TrainStep
from engine.checkpoint import read_weights
from engine.cli import TRAINING_FLAGS, amount, count, launch, make_parser, parse, part
from engine.data import open_latents, told_by_inputs
from engine.distributed import barrier
from engine.errors import InputError, blame, check_writable
from engine.run import Run, hold_frozen, run_folder
from engine.sampling import save_pruned
from engine.trainer import Trainer, start_network
from families import family_of, model_config, stack_layers
from pruning.gates import block_stacks, decide, interpolate
from pruning.lora import weight_update
from pruning.patterns import check_borders, format_pattern, parse_pattern
from pruning.surgery import keep_layers


def parse_args(argv=None):
    parser = make_parser(
        "prune_by_learning",
        __doc__,
        TRAINING_FLAGS + " save-model",
        "train",
        data_path="data/imagenet/train",
        prefix="learn_mask",
        ema_decay=0.999,
    )
    parser.add_argument(
        "--pattern", help="N:M groups, e.g. 1:2 for all layers, or 2:4x5,3:4x2 (default: the model name's)"
    )
    parser.add_argument("--delta-w", action="store_true", help="learn a weight update along with the gates")
    parser.add_argument("--lora", action="store_true", help="with --delta-w: by LoRA on every linear layer")
    parser.add_argument("--lora-rank", type=count, default=8, help="rank of LoRA; its alpha is twice the rank")
    parser.add_argument("--lr", type=amount, default=1e-4, help="learning rate of the weight update")
    parser.add_argument("--gate-lr", type=amount, default=1e-3, help="learning rate of the gates")
    parser.add_argument("--tau-range", type=float, nargs="+", default=[4, 0.1], help="first and last temperature")
    parser.add_argument("--scaling-range", type=float, nargs="+", default=[100.0, 100.0], help="first and last scaling")
    parser.add_argument(
        "--gate-samples", type=part, default=1.0, help="share of the skipped samples that gates learn from (see README)"
    )
    parser.add_argument("--dense", action="store_true", help="also run the backward of skipped samples (slower)")
    args = parse(parser, argv, told_by_inputs)
    for flag, values in (("--tau-range", args.tau_range), ("--scaling-range", args.scaling_range)):
        if len(values) != 2 or min(values) <= 0:
            parser.error(f"{flag} {values}: expected two numbers above 0, the first and the last value")
    if args.dense and args.gate_samples < 1:
        parser.error("--gate-samples: has no meaning with --dense, which runs all samples")
    if args.lora and not args.delta_w:
        parser.error("--lora: needs --delta-w; without it only the gates are learnt")
    return args


def choose_groups(args):
    config = model_config(args.model)
    if args.pattern is None and "groups" not in config:
        raise InputError(f"--model {args.model}: has no gates; give --pattern N:M or a gated name such as DiT-XL-1-2")
    with blame("--pattern", args.pattern):
        groups = parse_pattern(args.pattern or format_pattern(config["groups"]), sum(stack_layers(args.model)))
        check_borders(groups, stack_layers(args.model))
        return groups


def main(args):
    if not args.load_weight:
        raise InputError("--load-weight: missing; give the weights out of which the kept layers are cut")
    groups = choose_groups(args)
    args.save_model = args.save_model or os.path.join(run_folder(args), "pruned.pt")
    check_writable("--save-model", args.save_model)
    dataset, config = open_latents(args)
    net, facts = start_network(args, {**config, "groups": groups})

    run = Run(args, default_precision="bf16")
    run.open_folder()
    net = net(run.device)
    gates = net.gumbel_gates
    for stack in block_stacks(net):
        stack.dense, stack.gate_samples = args.dense, args.gate_samples
    weights = weight_update(net, args.delta_w, args.lora_rank if args.lora else None)
    hold_frozen(net, run.precision)
    run.log(f"gates over {format_pattern(groups)}; {sum(p.numel() for p in weights):,} other parameters are trained")
    step = TrainStep(net, family_of(args.model).objective(args)).to(run.device)
    groups_of_rates = [{"params": weights, "lr": args.lr}, {"params": list(gates), "lr": args.gate_lr}]
    trainer = Trainer(run, step, groups_of_rates, gates, args, facts=facts)
    total_steps = args.epochs * (len(dataset) // args.global_batch_size)

    def before_step(k):
        gates.tau = interpolate(args.tau_range, k, total_steps)
        gates.scaling = trainer.ema.module.scaling = interpolate(args.scaling_range, k, total_steps)

    def report(k):
        kept, confidence = decide(trainer.ema.module)
        metrics = {"kept": kept, "confidence": confidence} | ({"tau": gates.tau, "scaling": gates.scaling} if k else {})
        return [f"Decision: {kept}", f"Confidence: {[round(c, 4) for c in confidence]}"], metrics

    trainer.fit(dataset, args, total_steps, before_step, report)
    before_step(total_steps - 1)  # for the scaling, in case a finished run was only reopened
    save_decision(run, args, groups, *decide(trainer.ema.module))


def save_decision(run, args, groups, kept, confidence):
    """Log the final decision and cut it out of the original weights."""
    run.log(f"[!] Final Decision: {kept}")
    run.log(f"[!] Final Confidence: {[round(c, 4) for c in confidence]}")
    if run.is_main:
        pruned = keep_layers(read_weights(args.load_weight, "--load-weight"), kept)
        facts = {"source": args.load_weight, "kept": kept, "pattern": format_pattern(groups), "confidence": confidence}
        save_pruned(run, args, pruned, **facts)
    barrier()


if __name__ == "__main__":
    launch(main, parse_args)
