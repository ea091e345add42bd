r"""Drop the layers that change their input least (ShortGPT's block influence).

python prune_by_score.py --model DiT-XL/2 --ckpt pretrained/DiT-XL-2-256x256.pt --data-path features --n-pruned 14 \
    --save-model pruned.pt
"""

import torch
from tqdm import tqdm

from engine.calibration import calibration_batches
from engine.checkpoint import build_network, read_checked
from engine.cli import PRUNING_FLAGS, count, launch, make_parser, parse
from engine.data import told_by_latents
from engine.errors import InputError, check_writable
from engine.run import Run
from engine.sampling import check_sampling, find_ckpt, save_pruned, told_by_ckpt
from families import family_of, stack_layers
from pruning.scores import BlockInfluence, least_influential
from pruning.surgery import keep_layers


def parse_args(argv=None):
    parser = make_parser(
        "prune_by_score",
        __doc__,
        PRUNING_FLAGS + " data-path mirror",
        "train sample score",
        data_path="data/imagenet/train",
    )
    parser.add_argument("--nsamples", type=count, default=128, help="images to measure on")
    parser.add_argument("--batch-size", type=count, default=16, help="images per batch")
    parser.add_argument("--n-pruned", type=count, required=True, help="number of layers to drop")
    return parse(parser, argv, lambda args: told_by_latents(args.data_path, told_by_ckpt(args)))


@torch.inference_mode()
def measure(net, depth, objective, batches, clean_steps=None):
    """Block influence per layer over batches (x, y), noised as in training, or clean at steps below clean_steps."""
    influence = BlockInfluence(depth)
    for x, y in batches:
        if clean_steps:
            net(x, torch.randint(clean_steps, (len(x),), device=x.device), y, observe=influence)
        else:
            objective.predict(net, x, y, objective.draw(net, x, y), observe=influence)
    return influence.scores()


def main(args):
    if not args.save_model:
        raise InputError("--save-model: missing; name the file for the pruned weights")
    check_writable("--save-model", args.save_model)
    depth = sum(stack_layers(args.model))
    if args.n_pruned >= depth:
        raise InputError(f"--n-pruned {args.n_pruned}: {args.model} has {depth} layers; expected 1..{depth - 1}")
    if args.nsamples < args.batch_size:
        raise InputError(f"--nsamples {args.nsamples}: less than one batch; take {args.batch_size} or more")
    path = find_ckpt(args)
    state, config = read_checked(path, "--ckpt", args.model)
    if args.preview:
        check_sampling(args, state, path)
    run = Run(args)
    batches = calibration_batches(args, run.device, config)

    net = build_network(args.model, state, run.device, **config).eval()
    objective = family_of(args.model).objective(args).to(run.device)
    total = args.nsamples // args.batch_size
    scores = measure(
        net,
        depth,
        objective,
        tqdm(batches, total=total, desc="measuring", disable=not run.is_main),
        args.num_sampling_steps if args.clean_latents else None,
    )
    removed = least_influential(scores, args.n_pruned)
    kept = [layer for layer in range(depth) if layer not in removed]
    for layer, score in enumerate(scores):
        run.print(f"layer {layer:2d}  similarity {score:.6f}  {'removed' if layer in removed else 'kept'}")

    save_pruned(run, args, keep_layers(state, kept), source=path, kept=kept, scores=scores.tolist())


if __name__ == "__main__":
    launch(main, parse_args)
