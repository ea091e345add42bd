"""Command lines: every shared flag in one table, checks of what users give, and the way a script is started."""

import argparse
import sys
from pathlib import Path

from engine.distributed import is_main, shutdown
from engine.errors import InputError, RunError
from families import FAMILIES, family_of, model_config


def flag_type(convert):
    """Let argparse show the message of a ValueError raised by `convert`."""

    def checked(text):
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


def number(convert, low, high=None):
    """A converter for numbers from `low` to `high`, both included."""

    def checked(text):
        value = convert(text)
        if not (value >= low and (high is None or value <= high)):
            raise ValueError(f"{text}: expected {low}{' or more' if high is None else f' to {high}'}")
        return value

    return flag_type(checked)


def model_name(text):
    model_config(text)
    return text


def integer_list(text):
    """[0, 2, 4] or 0,2,4 -> list of int."""
    try:
        return [int(part) for part in text.strip().removeprefix("[").removesuffix("]").split(",")]
    except ValueError:
        raise ValueError(f"{text!r} is not a list of integers such as [0, 2, 4]") from None


count, share, amount, part = number(int, 1), number(float, 0, 1), number(float, 0), number(float, 0.01, 1)

FLAGS = {
    "--model": dict(
        type=flag_type(model_name), default="DiT-XL/2", help="network: a registered name, or e.g. DiT-D16/2"
    ),
    "--image-size": dict(type=count, default=256, help="height and width of the images, in pixels"),
    "--num-classes": dict(type=count, default=1000, help="number of classes; the null class has this number"),
    "--vae": dict(default="ema", help="autoencoder: ema or mse (hub), a local folder, or none to work on pixels"),
    "--device": dict(default="auto", help="auto (GPU if there is one), cpu, cuda or cuda:N"),
    "--precision": dict(choices=("fp32", "bf16", "fp16"), help="arithmetic of the network (default: see README)"),
    "--data-path": dict(required=True, help="folder of encoded latents (from extract_features.py)"),
    "--results-dir": dict(default="outputs", help="parent folder of run folders"),
    "--prefix": dict(default="", help="first part of the run folder's name, PREFIX-MODEL"),
    "--epochs": dict(type=count, default=1400, help="passes over the data"),
    "--global-batch-size": dict(type=count, default=256, help="images per step over all processes"),
    "--global-seed": dict(type=number(int, 0), default=0, help="seed of initial weights, data order and noise"),
    "--num-workers": dict(type=number(int, 0), default=4, help="loader processes per training process"),
    "--log-every": dict(type=count, default=100, help="steps between log lines"),
    "--ckpt-every": dict(type=count, default=10000, help="steps between checkpoints"),
    "--resume": dict(help="training state to continue from (default: the newest in the run folder)"),
    "--load-weight": dict(help="weights to start from"),
    "--ema-decay": dict(type=share, default=0.9999, help="decay per step of the averaged copy"),
    "--mirror": dict(type=share, default=0.5, help="probability of taking the mirrored picture"),
    "--lr": dict(type=amount, default=2e-4, help="learning rate of the first step"),
    "--min-lr": dict(type=amount, default=1e-4, help="learning rate at the end of the cosine"),
    "--weight-decay": dict(type=amount, default=0.0, help="weight decay of AdamW, of matrices only"),
    "--betas": dict(type=share, nargs=2, default=[0.9, 0.999], help="averages of AdamW"),
    "--warmup-epochs": dict(type=number(int, 0), default=0, help="epochs in which the learning rate rises from 0"),
    "--clip-norm": dict(type=amount, default=1.0, help="largest gradient norm, over all parameters"),
    "--ckpt": dict(help="weights, or the name of a published file, which is fetched if absent"),
    "--save-model": dict(help="file for the pruned weights (.pt or .safetensors)"),
    "--cfg-scale": dict(type=amount, default=4.0, help="guidance scale; up to 1 means no guidance"),
    "--num-sampling-steps": dict(type=count, default=250, help="steps of the sampler"),
    "--compile": dict(action="store_true", help="compile every block with torch.compile"),
    "--grad-checkpointing": dict(
        action="store_true", help="recompute activations in the backward: less memory, more time"
    ),
    "--grad-accumulation": dict(type=count, default=1, help="parts that each process's batch is computed in"),
    "--seed": dict(type=number(int, 0), default=0, help="seed of noise and random choices"),
    "--preview": dict(action="store_true", help="also sample a grid from the pruned network, as <save-model>.png"),
    "--no-ema": dict(
        action="store_true", help="take the plain weights of a training checkpoint, not the averaged ones"
    ),
}

TRAINING_FLAGS = (
    "data-path results-dir model image-size num-classes epochs global-batch-size global-seed vae num-workers "
    "log-every ckpt-every resume load-weight prefix ema-decay clip-norm mirror precision device compile "
    "grad-checkpointing grad-accumulation"
)
PRUNING_FLAGS = (
    "model vae image-size num-classes cfg-scale num-sampling-steps seed ckpt no-ema save-model preview device"
)
SAMPLING_FLAGS = "model vae image-size num-classes cfg-scale num-sampling-steps ckpt no-ema precision device compile"


def make_parser(script, doc, flags, kinds="", **changes):
    """A parser with the named rows of FLAGS and, of all families, the flags of some `kinds`, see families.Family.

    script: its name, under which families have defaults of their own. changes: defaults instead of those of the table,
    e.g. epochs=100 (None: as in the table).
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in flags.split():
        row = dict(FLAGS[f"--{name}"])
        dest = name.replace("-", "_")
        if dest in changes:
            row["default"] = changes.pop(dest)
            row.pop("required", None)
        others = {family.name: defaults_of(family, script).get(dest) for family in FAMILIES.values()}
        if row.get("default") not in (None, ""):
            known = [f"{family}: {value}" for family, value in others.items() if value not in (None, row["default"])]
            row["help"] += f" (default: {'; '.join([str(row['default']), *known])})"
        parser.add_argument(f"--{name}", **row)
    assert not changes, changes
    parser.set_defaults(script=script)
    parser.families = add_family_flags(parser, kinds.split())
    return parser


def add_family_flags(parser, kinds):
    """Add the flags that not all families have, with the default None; {flag: {family: its default there}}."""
    found = {}
    for family in FAMILIES.values():
        for name, row in (flag for kind in kinds for flag in family.flags.get(kind, {}).items()):
            dest = name.replace("-", "_")
            if dest not in found:
                owners = [f.name for f in FAMILIES.values() if any(name in f.flags.get(kind, {}) for kind in kinds)]
                shown = f"; default: {row['default']}" if row["default"] not in (None, False) else ""
                text = f"{row['help']} ({', '.join(owners)}{shown})"
                flag = name if row.get("nargs") == "?" else f"--{name}"
                given = {**row, "default": None, "help": text}
                if "range" in row:
                    given["type"] = number(row["type"], *given.pop("range"))
                parser.add_argument(flag, **given)
            found.setdefault(dest, {})[family.name] = row["default"]
    return found


def defaults_of(family, script):
    """Defaults of shared flags that a family has for a script."""
    return family.defaults.get("all", {}) | family.defaults.get(script, {})


def add_unused(parser, **flags):
    """Flags of the original that nothing ever read: accepted, and reported by `report_unused`."""
    for dest, row in flags.items():
        parser.add_argument("--" + dest.replace("_", "-"), **row, help="accepted for compatibility; has no effect")
    parser.set_defaults(unused=list(flags))


def parse(parser, argv, read_facts):
    """Parse more than once: what the family of --model and the files on the command line tell are defaults.

    read_facts(args) -> {flag: what the files tell}; the model it tells counts only if none is given.
    """
    args = parser.parse_args(argv)
    parser.shared = {a.dest: a.default for a in parser._actions if a.dest not in {"help", *parser.families}}
    told, family = {}, None
    while family is not family_of(args.model):  # the files may tell a model of another one
        family = family_of(args.model)
        set_family_defaults(parser, family)
        parser.set_defaults(**told)
        told = read_facts(parser.parse_args(argv))
        parser.set_defaults(**told)
        args = parser.parse_args(argv)
    for dest, owners in parser.families.items():
        if family.name not in owners and getattr(args, dest) not in (None, False):
            flag = "--" + dest.replace("_", "-") if dest != "mode" else getattr(args, dest)
            parser.error(f"{flag}: is for {' and '.join(owners)}, but --model {args.model} is a {family.name}")
    return args


def set_family_defaults(parser, family):
    known = {k: v for k, v in defaults_of(family, parser.get_default("script")).items() if k in parser.shared}
    own = {dest: owners.get(family.name) for dest, owners in parser.families.items()}
    parser.set_defaults(**{**parser.shared, **known, **own})


def report_unused(args, argv=None):
    given = {word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    for dest in args.unused:
        flag = "--" + dest.replace("_", "-")
        if flag in given and is_main():
            print(f"note: {flag} has no effect", file=sys.stderr)


def launch(main, parse_args):
    """Run a script: messages instead of tracebacks for what users can mend, and an orderly end of all processes."""
    try:
        main(parse_args())
    except (InputError, RunError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        shutdown()
