"""Runs a case: a command line in a folder of its own, in a forked process with limits, and judges the answer."""

import hashlib
import importlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from faults.good import BASES, words_of

SECONDS, GRACE = 20, 4  # of a case, and until a case that does not listen is ended
LONGEST = 600  # characters of a message, without the paths in it
MEMORY, LARGEST = 6 << 30, 1 << 28  # bytes of address space that a case may add, and of a file that it may write
SMALL = 1 << 24  # bytes of a file that is compared by content
MARKER = "payload-ran"  # the folder that code hidden in a file makes
EARLY_OUTPUT = ("out", "out/*-T-D?-2", "out/*/checkpoints", "out/*/log.txt")  # of a run whose state is refused
INPUT = re.compile(r"(?<![\w/.-])(?:\./)?in/[^\s,*]+")
REFUSED, SURVIVES, EITHER = "refused", "survives", "either"


@dataclass(frozen=True)
class Case:
    """One command line, and what it should be answered.

    name: unique, for people. kind: the group that it is counted in. words: after the script's name, relative to the
    case's folder, with inputs under in/. names: texts of which the message has to contain one, a flag or a file.
    make: what damages or adds inputs, called with the case's folder. expected: "refused" (a message of one line, and
    nothing is written but what `may_write` allows, patterns of paths), "survives" (the script ends as always, and says
    what `says` matches) or "either". needs: inputs to copy that no word names. check: called with the folder when the
    script has ended as always; says what is wrong with what it made, or "".
    """

    name: str
    kind: str
    script: str
    words: tuple
    names: tuple
    make: Callable | None = None
    expected: str = REFUSED
    may_write: tuple = ()
    says: str = ""
    needs: tuple = ()
    check: Callable | None = None


@dataclass
class Result:
    """What came of a case; reason: empty if it is as expected."""

    name: str
    kind: str
    script: str
    words: list
    expected: str
    reason: str = ""
    message: str = ""
    status: int | None = None
    where: str = ""
    seconds: float = 0.0
    wrote: list = field(default_factory=list)


def base_words(script, family="DiT"):
    """The good command line of a script."""
    return words_of(BASES[script], family)


class Slow(BaseException):
    """A case takes too long."""


class Asked(BaseException):
    """A case asks the network for a host."""


def copy_inputs(case, good, folder):
    """Copy the good inputs that a case names, with the facts beside them, or their nearest parent that exists."""
    named = (*case.needs, *case.words)
    together = ("in/vae",) if any("in/encoded" in text for text in named) else ()
    for text in (*named, *together):
        for name in INPUT.findall(text):
            parts = Path(os.path.normpath(name)).parts
            for end in range(len(parts), 1, -1):
                source = good / Path(*parts[:end])
                if os.path.lexists(source) and end > 1:
                    copy_one(source, folder / Path(*parts[:end]))
                    break
    (folder / "in").mkdir(exist_ok=True)


def copy_one(source, target):
    """Copy a file with its facts, or a folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
        return
    shutil.copy2(source, target)
    facts = Path(f"{source}.json")
    if facts.is_file():
        shutil.copy2(facts, f"{target}.json")


def snapshot(folder):
    """{relative path: what there is} of everything below a folder."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            found[os.path.relpath(path, folder)] = describe(path)
    return found


def describe(path):
    """Kind of a file, and of a regular one its size, time and content."""
    info = os.lstat(path)
    if os.path.islink(path):
        return ("link", os.readlink(path))
    if os.path.isdir(path):
        return ("folder",)
    if not os.path.isfile(path):
        return ("special", info.st_mode, info.st_rdev)
    digest = ""
    if info.st_size <= SMALL:
        with open(path, "rb") as file:
            digest = hashlib.md5(file.read(), usedforsecurity=False).hexdigest()
    return ("file", info.st_size, info.st_mtime_ns, digest)


def changes(before, after, allowed):
    """Paths that were made, changed or removed, but those that the patterns `allowed` match."""
    different = [path for path in before.keys() | after.keys() if before.get(path) != after.get(path)]
    return sorted(path for path in different if not any(fnmatch(path, pattern) for pattern in allowed))


def run_case(case, good, seconds=SECONDS):
    """Run a case in a forked process; returns its Result. good: the folder with all good inputs."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="case-") as parent:
        folder, private = Path(parent) / "place", Path(parent) / "private"
        folder.mkdir()
        private.mkdir()
        copy_inputs(case, Path(good), folder)
        if case.make:
            case.make(folder)
        before = snapshot(folder)
        answer = fork_and_wait(case, folder, private, seconds)
        wrote = changes(before, snapshot(folder), case.may_write)
        result = judge(case, answer, wrote)
        if case.check and not result.reason and answer["end"] == "returned":
            result.reason = check_outputs(case, folder)
    result.seconds = round(time.monotonic() - start, 2)
    return result


def check_outputs(case, folder):
    """What the case's own check says of the folder."""
    try:
        found = case.check(folder)
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    return f"made something else: {found}" if found else ""


def fork_and_wait(case, folder, private, seconds):
    """Run the script in a child, and return what it left behind as a dict."""
    child = os.fork()
    if not child:
        try:
            run_child(case, folder, private, seconds)
        finally:
            os._exit(0)
    end = time.monotonic() + seconds + GRACE
    status = None
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.005)
    else:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    answer = private / "answer.json"
    if answer.exists():
        found = json.loads(answer.read_text())
    elif status and os.WIFSIGNALED(status):
        found = {"end": "died", "message": signal.Signals(os.WTERMSIG(status)).name}
    else:
        found = {"end": "slow"}
    output = [private / name for name in ("stdout", "stderr")]
    return found | {path.name: path.read_text(errors="replace") for path in output if path.exists()}


def run_child(case, folder, private, seconds):
    """In the child: limits, the script, and a record of how it ended."""
    os.setsid()
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(private / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", errors="backslashreplace")
    sys.argv = [f"{case.script}.py", *case.words]
    set_limits(private)
    asked = block_network()
    signal.signal(signal.SIGALRM, raise_slow)
    signal.alarm(seconds)
    found = end_of(case)
    signal.alarm(0)
    found["asked"] = asked
    sys.stdout.flush()
    sys.stderr.flush()
    (private / "part.json").write_text(json.dumps(found))
    os.replace(private / "part.json", private / "answer.json")


def raise_slow(number, frame):
    raise Slow


def set_limits(private):
    """No more memory and disk than a case needs, and no cache or setting of the user."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST, LARGEST))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name in ("TORCH_HOME", "XDG_CACHE_HOME", "HF_HOME", "HOME"):
        os.environ[name] = str(private / name)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.pop("TINYFUSION_INCEPTION", None)


def block_network():
    """Let every look-up of a host end the case; returns the list of hosts that were asked for."""
    asked = []

    def refuse(host, *words, **options):
        asked.append(str(host))
        raise Asked

    socket.getaddrinfo = refuse
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]
    return asked


def end_of(case):
    """How the script ends, as a dict: `end` (returned, refused, slow, asked or raised), message, status, where."""
    from engine.errors import InputError, RunError

    try:
        script = importlib.import_module(case.script)
        script.main(script.parse_args(list(case.words)))
    except (InputError, RunError) as error:
        return {"end": "refused", "message": str(error), "status": 1}
    except SystemExit as stop:
        text = stop.code if isinstance(stop.code, str) else None
        status = 1 if text else int(stop.code or 0)
        return {"end": "refused" if status else "returned", "message": text, "status": status}
    except Slow:
        return {"end": "slow", "where": place_of(traceback.extract_tb(sys.exc_info()[2]))}
    except Asked:
        return {"end": "asked", "where": place_of(traceback.extract_tb(sys.exc_info()[2]))}
    except BaseException as error:
        where = place_of(traceback.extract_tb(error.__traceback__))
        kind = type(error).__name__
        return {"end": "raised", "kind": kind, "message": f"{kind}: {error}", "status": 1, "where": where}
    return {"end": "returned", "status": 0}


def place_of(frames):
    """The last line of ours in a traceback: file, line and function."""
    root = Path(__file__).resolve().parent.parent.parent
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(root) and "tests" not in frame.filename]
    ours = [frame for frame in ours if ".venv" not in frame.filename]
    if not ours:
        return ""
    return f"{Path(ours[-1].filename).relative_to(root)}:{ours[-1].lineno} {ours[-1].name}"


def judge(case, answer, wrote):
    """The Result of a case from what its process left behind."""
    message = answer.get("message") or ""
    if answer["end"] == "refused" and not message:  # of a parser, which prints it
        message = answer.get("stderr", "").rstrip("\n")
    result = Result(case.name, case.kind, case.script, list(case.words), case.expected)
    result.message, result.status, result.where = message, answer.get("status"), answer.get("where", "")
    result.wrote = wrote
    if MARKER in " ".join(wrote):
        result.reason = "payload ran"
    elif answer.get("asked"):
        result.reason = f"asked the network: {answer['asked'][0]}"
    elif answer["end"] == "slow":
        result.reason = "hang"
    elif answer["end"] == "died":
        result.reason = f"died: {message}"
    elif answer["end"] == "raised":
        result.reason = f"traceback: {answer['kind']}"
    elif case.expected == SURVIVES or (case.expected == EITHER and answer["end"] == "returned"):
        result.reason = judge_survivor(case, answer, wrote)
    else:
        result.reason = judge_refusal(case, answer, message, wrote)
    return result


def judge_survivor(case, answer, wrote):
    """Why a case that should go on did not; inputs are as they were."""
    if answer["end"] == "refused":
        return "refused"
    if not re.search(case.says, answer.get("stdout", "") + answer.get("stderr", "")):
        return "says nothing"
    touched = [path for path in wrote if path.startswith("in/")]
    return f"wrote: {', '.join(touched[:4])}" if touched else ""


def judge_refusal(case, answer, message, wrote):
    """Why a case that should be refused was not, or not well."""
    if answer["end"] == "returned":
        return "accepted"
    if wrote:
        return f"wrote: {', '.join(wrote[:4])}"
    if "Traceback (most recent call last)" in answer.get("stderr", ""):
        return "traceback: printed"
    if not message.strip():
        return "says nothing"
    if "\n" in message:
        return "several lines"
    if len(re.sub(r"\S{60,}", "", message)) > LONGEST:
        return "too long"
    if case.names and not any(name in message for name in case.names):
        return "does not name it"
    return ""


def as_dict(result):
    """A result as JSON holds it."""
    return asdict(result)
