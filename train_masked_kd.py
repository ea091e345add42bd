r"""Recover a pruned network by Masked KD: distil outputs and hidden states, leaving out extreme activations.

Example:
  torchrun --nnodes=1 --nproc_per_node=8 train_masked_kd.py --model DiT-D14/2 --load-weight pruned.pt \
      --data-path features --epochs 100 --teacher DiT-XL/2 --load-teacher pretrained/DiT-XL-2-256x256.pt
"""

from engine.cli import Command, launch, unused_flags
from engine.errors import InputError, flag_errors
from engine.flags import LORA_FLAGS, PREVIEW, TRAINING_FLAGS, shared
from engine.settings import TYPED
from families import family_of, model_name, stack_layers, stack_names
from families.flags import NEEDED, Flag, amount, limit, path_flag, path_text, share, whole

COMMAND = Command(
    "train_masked_kd",
    __doc__,
    own=(
        path_flag("load-teacher", "weights of the teacher, averaged if there are any", shown="none; must be given"),
        Flag("teacher", "network of the teacher", "DiT-XL/2", type=model_name, group=NEEDED, metavar="NAME"),
        Flag(
            "pattern",
            "N:M groups that pair the layers, e.g. 2:4x7",
            type=path_text,
            shown="even groups, else the pattern recorded with the weights",
            metavar="N:M",
        ),
        Flag("alpha", "weight of output distillation; the loss gets the rest", 0.9, type=share),
        Flag("beta", "weight of the feature loss in the first epoch", 1e-2, type=amount),
        Flag(
            "relative-beta",
            "in place of --beta: that weight relative to the output distillation, to which each layer's loss is scaled",
            type=amount,
            shown="none",
        ),
        Flag(
            "interval-steps",
            "first steps, in which each part of the student learns the teacher's map over its own layers alone, from "
            "the teacher's tokens; until then losses are those of the parts, and --alpha and --beta have no effect",
            0,
            type=whole,
        ),
        Flag("mask-threshold", "extreme: beyond so many standard deviations", 2.0, type=limit),
    ),
    shared=(*shared(f"{TRAINING_FLAGS} lr min-lr teacher-precision", num_workers=8, **PREVIEW), *LORA_FLAGS),
    kinds=("train", "sample"),
    weights=(("load_weight", "model"), ("load_teacher", "teacher")),
    latents=True,
    precision="fp16",
    unused=unused_flags(strong_aug=False),
)


def parse_args(argv=None):
    settings = COMMAND.resolve(argv)
    if settings.relative_beta is not None and settings.origins.get("beta") == TYPED:
        raise InputError(f"--relative-beta {settings.relative_beta}: takes the place of --beta; give one of them")
    return settings


def pair_layers(model, teacher, pattern, recorded):
    """Pairs by --pattern; else evenly; else by the pattern recorded with the weights or known of the release."""
    from pruning.distillation import even_groups, layer_pairs
    from pruning.patterns import parse_groups

    family = family_of(model)
    if family_of(teacher) is not family:
        raise InputError(
            f"--teacher {teacher}: is a {family_of(teacher).name}, but --model {model} is a {family.name}; "
            f"take a {family.name}"
        )
    student_layers, teacher_layers = stack_layers(model), stack_layers(teacher)
    is_even = all(t % s == 0 for s, t in zip(student_layers, teacher_layers, strict=True))
    text = pattern or (None if is_even else recorded or family.patterns.get(model))
    with flag_errors("--pattern", text or f"for --model {model} and --teacher {teacher}"):
        groups = (
            parse_groups(text, teacher_layers, stack_names(teacher))
            if text
            else even_groups(student_layers, teacher_layers)
        )
        return layer_pairs(sum(student_layers), sum(teacher_layers), groups)


def main(settings):
    from engine.data import network_config
    from engine.endings import say_next
    from engine.networks import NetworkStart, StateSketch, add_adapters, build_teacher
    from engine.optim import Recipe
    from engine.start import make_run, make_watch, open_data, start_training
    from engine.trainer import Trainer, TrainingOptions
    from pruning.distillation import DistillStep, feature_weight

    if not settings.load_teacher:
        raise InputError("--load-teacher: missing; give the weights of the network to learn from")
    run = make_run(settings, COMMAND)
    space, data = open_data(settings)
    watch = make_watch(settings, run, data, space)
    if settings.interval_steps >= data.total_steps:
        raise InputError(
            f"--interval-steps {settings.interval_steps}: the run has {data.total_steps} steps; leave some in which "
            "the parts are joined"
        )
    config, weights = network_config(data.dataset, space), settings.weights.get("load_weight")
    start = NetworkStart(settings.model, config, weights)
    recorded = start.describe(space).get("pattern")
    pairs = pair_layers(settings.model, settings.teacher, settings.pattern, recorded)
    teacher_start = NetworkStart(settings.teacher, config, settings.weights["load_teacher"], "--teacher")
    networks = {"student": start, "teacher": teacher_start}
    sketch = add_adapters(start.build_without_memory(), settings, run.precision)
    folder = start_training(settings, run, data, networks, StateSketch(sketch, sketch), start.describe(space))
    if folder is None:
        return

    net = start.build(run.home, run.precision if settings.lora else "fp32")
    add_adapters(net, settings, run.precision)
    teacher, compiled = build_teacher(teacher_start, run, settings), run.compiles(settings.compile)
    objective = settings.make_objective()
    is_relative = settings.relative_beta is not None
    beta = settings.relative_beta if is_relative else settings.beta
    how = (settings.alpha, beta, settings.mask_threshold, is_relative, compiled)
    step = DistillStep(net, teacher, objective, pairs, *how)
    recipe, options = settings.make(Recipe), settings.make(TrainingOptions)
    groups, schedule = recipe.groups(net), recipe.schedule(data.total_steps)
    trainer = Trainer(run, step, groups, net, options, schedule)

    def before_step(k):
        step.intervals = k < settings.interval_steps
        step.beta = feature_weight(beta, k // data.steps_per_epoch, settings.epochs)

    folder.log(f"layer pairs (student, teacher): {pairs}")
    trainer.fit(data, folder, before_step, lambda k: ([], {"beta": step.beta}), watch)
    say_next(run, "sample", ckpt=folder.state_path(data.total_steps), **settings.family.sample_hint)


if __name__ == "__main__":
    launch(main, parse_args)
