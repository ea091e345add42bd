"""The flags that several scripts share, one row each. Without torch."""

from dataclasses import replace

from engine.trackers import TRACKERS
from families import model_name
from families.flags import (
    NEEDED,
    SYSTEM,
    TRAINING,
    Flag,
    amount,
    classes,
    count,
    limit,
    name_text,
    number,
    path_flag,
    path_text,
    pixels,
    share,
    switch,
    whole,
)


def share_or_count(text):
    """A type for a part of the images: a share below 1, or a whole number of them."""
    value = amount(text)
    if value >= 1 and value != int(value):
        raise ValueError(f"{text}: expected a share below 1, or a whole number")
    return value


def tracker_list(text):
    """tensorboard,wandb -> list of those named. Raises ValueError for others."""
    names = [name.strip() for name in text.split(",")]
    wrong = [name for name in names if name not in TRACKERS]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is not one of {','.join(TRACKERS)}")
    return list(dict.fromkeys(names))


FLAGS = [
    Flag(
        "model",
        "network: a registered name, e.g. DiT-D16/2, or a folder of diffusers (also hf://OWNER/NAME)",
        "DiT-XL/2",
        type=model_name,
        metavar="NAME",
        group=NEEDED,
    ),
    path_flag("data-path", "folder of encoded latents (from extract_features.py)", required=True, metavar="FOLDER"),
    path_flag("load-weight", "weights to start from", shown="initial weights"),
    path_flag("ckpt", "weights, or the name of a published file, which is fetched", shown="DiT-XL/2's release"),
    path_flag("save-model", "file for the pruned weights (.pt or .safetensors)", shown="none; must be given"),
    Flag("image-size", "height and width of the images, in pixels", 256, type=pixels, group=NEEDED),
    Flag("num-classes", "number of classes; the null class has this number", 1000, type=classes, group=NEEDED),
    Flag(
        "vae",
        "autoencoder: ema or mse (hub), a local folder, or none to work on pixels",
        "ema",
        type=path_text,
        metavar="NAME",
        group=NEEDED,
    ),
    switch("no-ema", "take the plain weights of a training checkpoint, not the averaged ones", group=NEEDED),
    Flag("cfg-scale", "guidance scale; up to 1 means no guidance", 4.0, type=amount),
    Flag("num-sampling-steps", "steps of the sampler", 250, type=count),
    Flag("seed", "seed of noise and random choices", 0, type=whole),
    Flag(
        "init",
        "what kept layers start from: their own weights, or the average with the dropped layers nearest to them",
        "kept",
        choices=("kept", "average"),
    ),
    switch("preview", "also sample a grid from the pruned network, as <save-model>.png"),
    Flag("profile", "measure size, time and memory of the network before and after the cut", True, opposite=True),
    Flag("epochs", "passes over the data", 1400, type=count, group=TRAINING),
    Flag("global-batch-size", "images per step over all processes", 256, type=count, group=TRAINING),
    Flag("global-seed", "seed of initial weights, data order and noise", 0, type=whole, group=TRAINING),
    Flag("lr", "learning rate of the first step", 2e-4, type=amount, group=TRAINING),
    Flag("min-lr", "learning rate at the end of the cosine", 1e-4, type=amount, group=TRAINING),
    Flag("weight-decay", "weight decay of AdamW, of matrices only", 0.0, type=amount, group=TRAINING),
    Flag("betas", "averages of AdamW", [0.9, 0.999], type=number(float, 0, 0.999999), nargs=2, group=TRAINING),
    Flag("warmup-epochs", "epochs in which the learning rate rises from 0", 0, type=whole, group=TRAINING),
    Flag("clip-norm", "largest gradient norm, over all parameters", 1.0, type=limit, group=TRAINING),
    Flag("ema-decay", "decay per step of the averaged copy", 0.9999, type=share, group=TRAINING),
    switch(
        "ema-warmup",
        "let the decay rise as (1 + step) / (10 + step) up to --ema-decay: short runs forget their start",
        group=TRAINING,
    ),
    Flag("mirror", "probability of taking the mirrored picture", 0.5, type=share, group=TRAINING),
    Flag("device", "auto (GPU if there is one), cpu, cuda or cuda:N", "auto", metavar="NAME", group=SYSTEM),
    Flag("precision", "arithmetic of the network", None, choices=("fp32", "bf16", "fp16"), group=SYSTEM),
    Flag(
        "teacher-precision",
        "arithmetic of the teacher, and what its matrices are held in",
        None,
        choices=("fp32", "bf16", "fp16"),
        shown="as --precision",
        group=SYSTEM,
    ),
    Flag("vae-precision", "arithmetic of the autoencoder", "fp32", choices=("fp32", "bf16"), group=SYSTEM),
    Flag("num-workers", "loader processes per training process", 4, type=whole, group=SYSTEM),
    path_flag("results-dir", "parent folder of run folders", "outputs", group=SYSTEM, metavar="FOLDER"),
    Flag(
        "prefix",
        "first part of the run folder's name, PREFIX-MODEL",
        "",
        type=name_text,
        shown="none",
        metavar="WORD",
        group=SYSTEM,
    ),
    path_flag("resume", "training state to continue from", shown="the newest in the run folder", group=SYSTEM),
    Flag("log-every", "steps between log lines", 100, type=count, group=SYSTEM),
    Flag(
        "log-to",
        "log there too: tensorboard, wandb, or both",
        [],
        type=tracker_list,
        shown="the run folder alone",
        metavar="LIST",
        group=SYSTEM,
    ),
    Flag("eval-every", "steps between losses on the held-out images", type=count, shown="never", group=SYSTEM),
    Flag(
        "eval-split",
        "images to hold out of training: a share below 1, or a number",
        0.0,
        type=share_or_count,
        shown="none",
        group=TRAINING,
    ),
    Flag("sample-every", "steps between grids that the network draws", type=count, shown="never", group=SYSTEM),
    Flag("ckpt-every", "steps between checkpoints", 10000, type=count, group=SYSTEM),
    Flag("keep-checkpoints", "newest checkpoints that stay", type=count, shown="all", metavar="N", group=SYSTEM),
    Flag("keep-every", "steps whose multiples stay too", type=count, shown="none", metavar="N", group=SYSTEM),
    Flag(
        "compile",
        "compile the networks with torch.compile, block by block",
        opposite=True,
        shown="on with a GPU",
        group=SYSTEM,
    ),
    switch("grad-checkpointing", "recompute activations in the backward: less memory, more time", group=SYSTEM),
    switch("shard", "split the network and its training over the processes (FSDP): less memory in each", group=SYSTEM),
    Flag("grad-accumulation", "parts that each process's batch is computed in", 1, type=count, group=SYSTEM),
    switch("dry-run", "check everything, show settings, sizes and steps, and stop", group=SYSTEM),
]
LORA_FLAGS = (
    switch("lora", "train adapters of every linear layer alone; weights stay, held and saved in --precision"),
    Flag("lora-rank", "rank of --lora; its alpha is twice the rank", 8, type=count),
)
TABLE = {flag.name: flag for flag in FLAGS}

MODEL = "model vae image-size num-classes"
START = f"data-path load-weight no-ema {MODEL}"
TRAINING_FLAGS = (
    f"{START} epochs global-batch-size global-seed clip-norm ema-decay ema-warmup mirror results-dir prefix resume "
    "log-every log-to eval-every eval-split sample-every cfg-scale num-sampling-steps "
    "ckpt-every keep-checkpoints keep-every "
    "num-workers precision device compile grad-checkpointing shard grad-accumulation dry-run"
)
PREVIEW = {"num_sampling_steps": 50}  # defaults of --sample-every
PRUNING_FLAGS = f"ckpt no-ema save-model init {MODEL} cfg-scale num-sampling-steps seed preview profile device dry-run"
SAMPLING_FLAGS = f"ckpt no-ema {MODEL} cfg-scale num-sampling-steps precision vae-precision device compile"


def shared(names, **defaults):
    """The rows of the table called `names` (words), some with other defaults, by setting: shared("lr", lr=1e-4).

    A required flag that gets a default is required no more.
    """
    rows = []
    for name in names.split():
        row = TABLE[name]
        if row.dest in defaults:
            row = replace(row, default=defaults.pop(row.dest), required=False, shown="")
        rows.append(row)
    assert not defaults, defaults
    return tuple(rows)
