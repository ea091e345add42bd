r"""Learn which layers to keep, then cut the others out of the original weights.

Example:
  torchrun --nnodes=1 --nproc_per_node=8 prune_by_learning.py --model DiT-XL-1-2 \
      --load-weight pretrained/DiT-XL-2-256x256.pt --data-path features --epochs 1 --global-batch-size 128 \
      --delta-w --lora --save-model pruned.pt
"""

from pathlib import Path

from engine.cli import Command, launch
from engine.errors import InputError, flag_errors
from engine.flags import PREVIEW, TRAINING_FLAGS, shared
from engine.settings import TYPED
from families import depth_name, family_of, model_config, stack_layers, stack_names
from families.flags import TRAINING, Flag, above_zero, amount, count, number, path_flag, path_text, switch

TEACHER_SHARES = {"data": 0.0, "teacher": 1.0, "both": 0.5}  # of the loss, by --target
GRADIENTS = ("straight-through", "pairs")
DENSE_UP_TO = 16  # images of a process at a time; where a GPU waits for its processor, see docs/performance.md
COMMAND = Command(
    "prune_by_learning",
    __doc__,
    own=(
        path_flag("save-model", "file for the pruned weights", shown="pruned.pt in the run folder"),
        Flag(
            "pattern",
            "N:M groups, e.g. 1:2 for all layers, or 2:4x5,3:4x2",
            type=path_text,
            shown="that of a gated model's name",
            metavar="N:M",
        ),
        switch("delta-w", "learn a weight update along with the gates"),
        switch("lora", "with --delta-w: by LoRA on every linear layer"),
        Flag("lora-rank", "rank of LoRA; its alpha is twice the rank", 8, type=count),
        Flag("tau-range", "first and last temperature", [4.0, 0.1], type=above_zero, nargs=2),
        Flag("scaling-range", "first and last scaling", [100.0, 100.0], type=above_zero, nargs=2),
        Flag(
            "candidates",
            "of a group: all ways to keep N of its M layers; the N + 1 that drop layers in a row; or all, by scores of "
            "the layers, of which a way has the sum",
            "all",
            choices=("all", "contiguous", "layers"),
        ),
        Flag(
            "target",
            "what gates and update learn to predict: the data, the whole network's output, or half of each",
            "data",
            choices=tuple(TEACHER_SHARES),
        ),
        Flag(
            "gate-gradient",
            "of the gates: the published one, or the difference of the losses of two choices for every image, which "
            "has no bias; take --gate-lr 2e-4 with it",
            "straight-through",
            choices=GRADIENTS,
        ),
        Flag("gate-samples", "share of skipped samples that gates learn from", 1.0, type=number(float, 0.01, 1)),
        Flag(
            "init",
            "what kept layers start from: their own weights, these with the learned update, or "
            "the average with the dropped layers nearest to them",
            "kept",
            choices=("kept", "learned", "average"),
        ),
        Flag("finalists", "most probable choices that are written, the second as <save-model>-2, ...", 1, type=count),
        Flag(
            "dense",
            "also run the backward of skipped samples: more work and memory in fewer steps, faster for few images",
            opposite=True,
            shown=f"on with a GPU and up to {DENSE_UP_TO} images a process",
        ),
        Flag("lr", "learning rate of the weight update", 1e-4, type=amount, group=TRAINING),
        Flag("gate-lr", "learning rate of the gates", 1e-3, type=amount, group=TRAINING),
    ),
    shared=shared(
        f"{TRAINING_FLAGS} teacher-precision profile",
        data_path="data/imagenet/train",
        prefix="learn_mask",
        ema_decay=0.999,
        **PREVIEW,
    ),
    kinds=("train", "sample", "prune"),
    weights=(("load_weight", "model"),),
    latents=True,
    precision="bf16",
)


def parse_args(argv=None):
    settings = COMMAND.resolve(argv)
    if settings.dense and settings.gate_samples < 1:
        raise InputError("--gate-samples: has no meaning with --dense, which runs all samples")
    if settings.gate_gradient == "pairs":
        for name in ("gate_samples", "dense", "tau_range"):
            if settings.origins.get(name) == TYPED:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{flag}: has no meaning with --gate-gradient pairs; leave it out")
    if settings.lora and not settings.delta_w:
        raise InputError("--lora: needs --delta-w; without it only the gates are learnt")
    if settings.init == "learned" and not settings.delta_w:
        raise InputError("--init learned: needs --delta-w; without it no weights are learnt")
    if not settings.load_weight:
        raise InputError("--load-weight: missing; give the weights out of which the kept layers are cut")
    return settings


def choose_groups(model, pattern, candidates):
    """The N:M groups of --pattern, else of the model's name."""
    from pruning.patterns import check_candidates, format_pattern, parse_groups

    config = model_config(model)
    if pattern is None and "groups" not in config:
        gated = "" if family_of(model).find_model else " or a gated name such as DiT-XL-1-2"
        raise InputError(f"--model {model}: has no gates; give --pattern N:M{gated}")
    with flag_errors("--pattern", pattern):
        stacks = stack_layers(model), stack_names(model)
        groups = parse_groups(pattern or format_pattern(config["groups"]), *stacks)
        if candidates != "contiguous":
            check_candidates(groups)
        return groups


def choice_paths(path, count):
    """Where the most probable choices are written: pruned.pt, pruned-2.pt, ..."""
    path = Path(path)
    return [path, *(path.with_stem(f"{path.stem}-{place}") for place in range(2, count + 1))]


def runs_dense(settings, run):
    """Whether the backward of skipped samples is run as well: as asked for; by default where it is measured faster.

    A GPU is done with few images before the processor has asked for the next operation, and the sparse form has more.
    """
    if settings.dense is not None:
        return settings.dense
    images = settings.global_batch_size // (run.world * settings.grad_accumulation)
    is_usual = settings.gate_gradient == "straight-through" and settings.gate_samples == 1
    is_short_of_memory = settings.grad_checkpointing or run.sharded
    return run.on_gpu and is_usual and not is_short_of_memory and images <= DENSE_UP_TO


def choose_file(settings):
    """Where the pruned weights go; raises InputError if a file cannot be written, or is one that this run reads."""
    from engine.pruned import check_target
    from engine.run_folder import run_path

    folder = run_path(settings.results_dir, settings.prefix, settings.model)
    save_model = settings.save_model or folder / settings.family.pruned_file
    inputs = {name: getattr(settings, name) for name in ("load_weight", "data_path", "vae", "resume")}
    for path in choice_paths(save_model, settings.finalists):
        check_target(settings, path, **inputs)
    return save_model


def plan_networks(settings, groups, data, space):
    """{word: NetworkStart}: the gated network, and the whole one as a teacher if that is what it learns from."""
    from engine.data import network_config
    from engine.networks import NetworkStart

    config, original = network_config(data.dataset, space), settings.weights["load_weight"]
    gated = {**config, "groups": groups, "candidates": settings.candidates}
    networks = {"network": NetworkStart(settings.model, gated, original)}
    if TEACHER_SHARES[settings.target]:
        plain_name = depth_name(settings.model, stack_layers(settings.model))
        networks["teacher"] = NetworkStart(plain_name, config, original)
    return networks


def add_update(net, settings, precision):
    """Choose what is trained besides the gates; returns these parameters."""
    from engine.run import cast_frozen_weights
    from pruning.lora import weight_update

    weights = weight_update(net, settings.delta_w, settings.lora_rank if settings.lora else None)
    cast_frozen_weights(net, precision)
    return weights


def make_step(net, teacher, settings):
    """The training step of a network; the teacher, if there is one, is not trained."""
    from diffusion.objectives import TrainStep
    from pruning.distillation import DistillStep
    from pruning.pairs import PairStep

    objective, share = settings.make_objective(), TEACHER_SHARES[settings.target]
    if settings.gate_gradient == "pairs":
        return PairStep(net, objective, share, teacher)
    return DistillStep(net, teacher, objective, (), share, beta=0.0) if share else TrainStep(net, objective)


def describe_decision(averaged, state):
    """(lines, metrics) of the log: what averaged gates choose now, and how likely every layer is to stay."""
    from pruning.gates import decide, keep_probabilities

    kept, confidence = decide(averaged)
    lines = [f"Decision: {kept}", f"Confidence: {[round(c, 4) for c in confidence]}"]
    told = {"kept": kept, "confidence": confidence, "keep_probability": keep_probabilities(averaged)}
    return lines, {**told, **state}


def main(settings):
    from engine.distributed import on_main
    from engine.endings import say_recovery
    from engine.networks import StateSketch, build_teacher
    from engine.profile import Profiler
    from engine.pruned import check_start, save_pruned
    from engine.start import make_run, make_watch, open_data, start_training
    from engine.trainer import Trainer, TrainingOptions
    from pruning.gates import GateSchedule, decide, likeliest, set_routing
    from pruning.lora import learned_weights
    from pruning.patterns import format_pattern
    from pruning.surgery import cut_layers

    groups = choose_groups(settings.model, settings.pattern, settings.candidates)
    run, save_model = make_run(settings, COMMAND), choose_file(settings)
    space, data = open_data(settings)
    watch = make_watch(settings, run, data, space)
    networks, original = plan_networks(settings, groups, data, space), settings.weights["load_weight"]
    check_start(settings.init, original, settings.model)
    start = networks["network"]
    sketch = start.build_without_memory()
    add_update(sketch, settings, run.precision)
    state = StateSketch(sketch, sketch.gumbel_gates)
    folder = start_training(settings, run, data, networks, state, start.describe(space))
    if folder is None:
        return

    is_frozen = settings.lora or not settings.delta_w
    net, dense = start.build(run.home, run.precision if is_frozen else "fp32"), runs_dense(settings, run)
    gates, weights = net.gumbel_gates, add_update(net, settings, run.precision)
    set_routing(net, dense, settings.gate_samples)
    folder.log(
        f"gates over {format_pattern(groups)}, {'dense' if dense else 'sparse'}; "
        f"{sum(p.numel() for p in weights):,} other parameters are trained"
    )
    teacher = build_teacher(networks["teacher"], run, settings) if "teacher" in networks else None
    rates = [{"params": weights, "lr": settings.lr}, {"params": list(gates), "lr": settings.gate_lr}]
    trainer = Trainer(run, make_step(net, teacher, settings), rates, gates, settings.make(TrainingOptions))
    averaged = trainer.ema.module
    schedule = settings.make(GateSchedule, total_steps=data.total_steps)

    def report(k):
        return describe_decision(averaged, {"tau": gates.tau, "scaling": gates.scaling} if k else {})

    trainer.fit(data, folder, lambda k: schedule.apply(k, gates, averaged), report, watch)
    schedule.apply(data.total_steps - 1, gates, averaged)  # for the scaling, in case a finished run was only reopened
    kept, confidence = decide(averaged)
    folder.log(f"[!] Final Decision: {kept}")
    folder.log(f"[!] Final Confidence: {[round(c, 4) for c in confidence]}")
    trained = trainer.gather_weights()
    facts = {"source": original.name, "init": settings.init, "pattern": format_pattern(groups)}

    def save_choices():
        weights = learned_weights(net, original.state, trained) if settings.init == "learned" else original.state
        profiler = Profiler(run, settings.model, weights) if settings.profile else None
        choices = likeliest(averaged, settings.finalists)
        for place, (path, layers) in enumerate(zip(choice_paths(save_model, len(choices)), choices, strict=True), 1):
            told = {"confidence": confidence} if place == 1 else {"place": place}
            pruned = cut_layers(weights, layers, settings.init, stack_names(settings.model))
            own = settings.own("prune") if place == 1 else None
            save_pruned(run, path, pruned, settings.model, space, profiler, own, **facts, kept=layers, **told)

    on_main(save_choices, patient=True)
    whole = depth_name(settings.model, stack_layers(settings.model))
    say_recovery(run, save_model, original.name, whole, settings.data_path)


if __name__ == "__main__":
    launch(main, parse_args)
