"""The command line of a script: its flags in groups, read in one pass, and the way it is started. Without torch."""

import argparse
import difflib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from engine.errors import InputError, RunError, StoppedError
from engine.resolve import resolve
from families import FAMILIES
from families.flags import FAMILY, GROUPS, UNUSED, Flag


@dataclass(frozen=True)
class Command:
    """What a script takes.

    name: of the script, by which families have defaults for it. doc: its docstring, of which the text after "Example:"
    ends the help. own, shared: its own flags and those of engine.flags. kinds: of families' flags, see
    families.family.Family; None for a script that knows no networks. weights: pairs (setting that names a file, setting
    that names its model). latents: whether data-path holds encoded latents that tell settings. scratch: whether the
    family's settings of training from scratch apply without weights. precision: what an unset --precision is on a GPU.
    unused: flags that the original has and never reads.
    """

    name: str
    doc: str
    own: tuple = ()
    shared: tuple = ()
    kinds: tuple | None = ()
    weights: tuple = ()
    latents: bool = False
    scratch: bool = False
    precision: str = "fp32"
    unused: tuple = ()

    def family_flags(self):
        """Flags that not all families have, each once."""
        rows = [flag for family in FAMILIES.values() for flag in family.own_flags(self.kinds or ())]
        return list({flag.dest: flag for flag in rows}.values())

    def owners(self, flag):
        """Names of the families that have a flag."""
        return [family.name for family in FAMILIES.values() if flag in family.own_flags(self.kinds)]

    def flags(self):
        """All flags: the script's own, shared ones, families', unused ones."""
        return [*self.own, *self.shared, *self.family_flags(), *self.unused]

    def defaults(self):
        """{setting: default} but those of families' flags."""
        return {flag.dest: flag.default for flag in (*self.own, *self.shared, *self.unused)}

    def parse(self, argv=None):
        """{setting: value} of what was typed. Ends the process for --help, and with a message for a wrong flag."""
        parser, words = make_parser(self), sys.argv[1:] if argv is None else argv
        self._refuse_unknown(parser, words)
        found = parser.parse_args(words)
        return {name: value for name, value in vars(found).items() if value is not None}

    def _refuse_unknown(self, parser, words):
        """End the process with the nearest flag, before anything else is said of the command line."""
        options = [
            "--help",
            *(flag.option for flag in self.flags()),
            *(f"--no-{f.name}" for f in self.flags() if f.opposite),
        ]
        for word in words:
            name = word.partition("=")[0]
            if name.startswith("--") and name != "--" and not any(option.startswith(name) for option in options):
                near = difflib.get_close_matches(name, options, n=1)
                advice = f"did you mean {near[0]}?" if near else "--help lists the flags"
                parser.error(f"{name}: there is no such flag; {advice}")

    def resolve(self, argv=None, typed=None):
        """Settings of the command line, or of what was `typed` on it; see engine.resolve."""
        return resolve(self, self.parse(argv) if typed is None else typed)


class ShortParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage of sixty flags."""

    def error(self, message):
        advice = "; --help says what they are" if message.startswith("the following arguments") else ""
        self.exit(2, f"{self.prog}: error: {message}{advice}\n")


def make_parser(command):
    """A parser that keeps only what is typed, with help in groups."""
    description, _, example = command.doc.partition("Example:")
    positionals = [name_positional(flag) for flag in command.flags() if flag.positional]
    parser = ShortParser(
        prog=f"{command.name}.py",
        usage=" ".join(["%(prog)s", *positionals, "[flags]"]),
        description=description.strip(),
        epilog=f"example:\n  {example.strip()}" if example else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    titles = {flag.group for flag in command.flags()}
    groups = {title: parser.add_argument_group(title) for title in GROUPS if title in titles}
    for flag in command.flags():
        add_flag(groups[flag.group], flag, describe_default(command, flag))
    return parser


def add_flag(group, flag, default):
    """Add a row to a group of the parser; `default`: as help shows it."""
    options = {"help": f"{flag.help} {default}".replace("%", "%%")}
    if flag.positional:
        options |= {"nargs": flag.nargs, "choices": flag.choices, "metavar": flag.metavar}
        options["type"] = as_argument(flag.type)
        group.add_argument(flag.name, **options)
        return
    if flag.opposite:
        options |= {"action": argparse.BooleanOptionalAction}
    elif flag.switch:
        options |= {"action": "store_true"}
    else:
        options |= {"type": as_argument(flag.type), "choices": flag.choices, "nargs": flag.nargs}
        options |= {"metavar": flag.metavar or name_value(flag)}
    group.add_argument(flag.option, dest=flag.dest, default=None, required=flag.required, **options)


def name_positional(flag):
    """A positional argument as usage shows it."""
    name = flag.metavar or "{" + ",".join(flag.choices) + "}"
    return name if flag.required else f"[{name}]"


def name_value(flag):
    """What help calls the value of a flag: N for whole numbers, X for others; None lists the choices."""
    if flag.choices:
        return None
    kinds = {int: "N", float: "X"}
    return kinds.get(type(as_list(flag.default)[0]), "VALUE")


def as_argument(convert):
    """A converter whose ValueError argparse shows as it is."""
    if convert is None:
        return None

    def checked(text):
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


def describe_default(command, flag):
    """The end of a row of help: for whom it is, and its default, of other families too."""
    if flag.group == UNUSED:
        return ""
    if flag.required:
        return "(required)"
    if flag.dest == "precision":
        return f"(default: {command.precision} on a GPU, fp32 on a CPU)"
    if flag.switch or flag.opposite:
        usual = "on" if flag.default else "off"
    else:
        usual = " ".join(map(str, as_list(flag.default)))
    default = flag.shown or usual
    if flag.group == FAMILY:
        return f"({', '.join(command.owners(flag))}; default: {default})"
    others = {family.name: family.defaults_for(command.name).get(flag.dest) for family in FAMILIES.values()}
    shown = [f"{name}: {value}" for name, value in others.items() if value not in (None, flag.default)]
    return f"(default: {'; '.join([default, *shown] if command.kinds is not None else [default])})"


def as_list(value):
    return value if isinstance(value, list) else [value]


def unused_flags(**defaults):
    """Flags of the original that it never read: accepted, and reported as without effect. False: a switch."""
    rows = []
    for dest, default in defaults.items():
        kind = int if isinstance(default, int) and default is not False else None
        rows.append(
            Flag(dest.replace("_", "-"), "no effect", default, type=kind, switch=default is False, group=UNUSED)
        )
    return tuple(rows)


def grow_in_segments():
    """Have torch keep a GPU's memory in one piece, unless the environment says how; before any of it is taken.

    Sizes change with every layer and step of gate learning, and memory would fall to pieces.
    """
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # the new name, which the old one would beat
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def launch(main, parse_args):
    """Run a script: messages instead of tracebacks for what users can correct, and an orderly end of all processes."""
    grow_in_segments()
    try:
        sys.exit(run_script(main, parse_args))
    finally:
        if "torch" in sys.modules:
            from engine.distributed import shutdown

            shutdown()


def run_script(main, parse_args):
    """The exit status of a script: 0, 1 with a message for what users can correct, 128 + N when stopped by signal N."""
    try:
        main(parse_args())
    except (InputError, RunError) as error:
        if should_say(error):
            say(error)
        return 128 + error.signal if isinstance(error, StoppedError) else 1
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        reason = str(error).strip().splitlines()[0]
        say(f"another process of this run has ended or does not answer ({reason}); see its message, then repeat")
        return 1
    except SystemExit as end:
        if end.code == 2:  # argparse has said why
            should_say(InputError("its command line is wrong"))
        raise
    except KeyboardInterrupt:
        return 130
    return 0


def say(error):
    """Show an error as the scripts do."""
    print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)


def is_lost_process(error):
    """Whether a RuntimeError is torch's way to say that an exchange with another process has failed."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (int(os.environ.get("WORLD_SIZE", 1)) > 1 and "gloo" in str(error).lower())


def should_say(error):
    """Whether this process shows an error: one of a process alone is told to the others, one of all is shown once."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return True
    from engine.distributed import is_first_of_host, refuse

    return is_first_of_host() if getattr(error, "shared", False) else refuse(str(error))
