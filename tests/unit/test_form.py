"""The form of the project: who imports whom, what help says, and that published flags and command lines work."""

import ast
import importlib
import json
import re
import subprocess
import sys
import time

import pytest

SCRIPTS = ["extract_features", "train", "train_masked_kd", "sample", "sample_ddp", "evaluator"]
SCRIPTS += ["prune_by_learning", "prune_by_score", "prune_by_index"]
SCRIPTS += ["report_runs", "inspect_weights", "export_diffusers"]
OURS = {"pruning", "diffusion", "engine", "models", "families", "evaluation", "models_mar", "reporting"}
OURS |= {"models_diffusers"}
THIRD = {"torch", "numpy", "tqdm", "timm", "PIL", "diffusers", "safetensors", "scipy", "torchvision", "sklearn"}
THIRD |= {"huggingface_hub", "wandb"}
ALLOWED = {  # part -> modules it may import besides the standard library
    "pruning": {"torch", "pruning"},
    "diffusion": {"torch", "numpy", "tqdm", "diffusers", "torchdiffeq", "diffusion"},
    "models.py": {"torch", "timm", "families.dit", "families.sit", "pruning.gates"},
    "models_mar.py": {"torch", "timm", "models", "families.mar", "pruning.gates", "pruning.patterns"},
    "models_diffusers.py": {"torch", "diffusers", "families", "pruning", "engine.errors"},
    "families": {"torch", "diffusion", "families"},
    "families/of_diffusers.py": {
        *("diffusion", "families", "pruning.surgery"),
        *("engine.errors", "engine.files", "engine.hub", "engine.vae"),
    },
    "families/diffusers_stacks.py": {"torch", "diffusers", "families", "pruning.surgery"},
    "families/dit_diffusers.py": {"torch", "numpy", "scipy", "families", "models"},
    "evaluation": {
        "torch",
        "torchvision",
        "numpy",
        "scipy",
        "tqdm",
        "PIL",
        "tensorflow",
        "evaluation",
        "engine.files",
        "engine.threads",
    },
    "reporting": {"reporting", "engine.files", "engine.errors"},
    "engine": (OURS | THIRD) - {"pruning", "models", "models_mar", "models_diffusers", "evaluation", "reporting"}
    | {"pruning.gates", "pruning.patterns", "pruning.lora", "pruning.surgery"},
}


def sources(root):
    """All Python files of the project but tests and what is not in the repository."""
    return sorted(
        path
        for path in root.rglob("*.py")
        if not any(part.startswith(".") or part in ("tests", "run") for part in path.relative_to(root).parts)
    )


def imports(path):
    """Full names of the modules that a file imports, `from a.b import c` as a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def is_allowed(module, allowed):
    parts = module.split(".")
    return any(".".join(parts[: i + 1]) in allowed for i in range(len(parts))) or parts[0] in sys.stdlib_module_names


@pytest.mark.parametrize("part", ALLOWED)
def test_import_rule(root, part):
    files = (
        {root / part} if part.endswith(".py") else set((root / part).glob("*.py")) - {root / name for name in ALLOWED}
    )
    assert files
    wrong = {(f.name, module) for f in files for module in imports(f) if not is_allowed(module, ALLOWED[part])}
    assert not wrong


def test_readme_fits_a_terminal(root):
    assert not [line for line in (root / "README.md").read_text().splitlines() if len(line) >= 100]


def test_nobody_imports_a_script(root):
    wrong = {(f.name, module) for f in sources(root) for module in imports(f) if module.split(".")[0] in SCRIPTS}
    assert not wrong


def test_only_the_engine_names_devices(root):
    """`cuda` is named in two files; elsewhere only where memory is pinned, gradients scaled or kernels timed."""
    found = set()
    for path in sources(root):
        if path.relative_to(root).as_posix() in ("engine/run.py", "engine/distributed.py"):
            continue
        lines = path.read_text().splitlines()
        for node in ast.walk(ast.parse(path.read_text())):
            named = getattr(node, "attr", None) == "cuda" or getattr(node, "value", None) == "cuda"
            if named and not re.search("pin_memory|GradScaler|ProfilerActivity", lines[node.lineno - 1]):
                found.add(f"{path.relative_to(root)}:{node.lineno}")
    assert not found


def test_no_copied_helper(root):
    """No two functions of the project have the same body (of three statements or more)."""
    bodies = {}
    for path in sources(root):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and len(node.body) >= 3:
                text = "\n".join(ast.dump(statement) for statement in node.body[1:])
                bodies.setdefault(text, []).append(f"{path.name}:{node.name}")
    assert not [names for names in bodies.values() if len(names) > 1]


def modules(root):
    """{name: file} of all modules of the project."""
    found = {}
    for path in sources(root):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def dependencies(root):
    """{module: modules of ours that it imports, anywhere in the file}."""
    known, graph = modules(root), {}
    for name, path in known.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            named = []
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                named = [each if each in known else node.module for each in inner]
            graph[name] |= {each for each in named if each in known and each != name}
    return graph


def find_circle(graph):
    """Names along an import circle, or None."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        path.append(name)
        for other in sorted(graph[name]):
            if circle := visit(other):
                return circle
        path.pop()
        done.add(name)
        return None

    return next(filter(None, map(visit, sorted(graph))), None)


def test_circles_are_found():
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_no_import_circle(root):
    """Imports inside functions count too."""
    assert find_circle(dependencies(root)) is None


def test_every_module_says_what_it_is_for(root):
    silent = [name for name, path in modules(root).items() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent


def test_no_parameter_called_args(root):
    """Libraries take values."""
    found = [
        f"{path.name}:{node.name}"
        for path in sources(root)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        if argument.arg == "args"
    ]
    assert not found


def test_no_stand_in_for_settings(root):
    """No test and no benchmark makes a namespace that plays settings or a run."""
    played = {"device", "rank", "world", "precision", "global_batch_size", "ema_decay", "seed", "vae"}
    wrong = []
    for path in (*sources(root), *(root / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Namespace"):
                wrong += [f"{path.name}:{node.lineno}" for keyword in node.keywords if keyword.arg in played]
    assert not wrong


def command_of(name):
    return importlib.import_module(name).COMMAND


def help_of(root, name):
    """(what --help prints, modules that it imports) of a script in a process of its own."""
    code = (
        f"import sys, runpy\nsys.argv = ['{name}.py', '--help']\n"
        f"try: runpy.run_path('{name}.py', run_name='__main__')\n"
        "except SystemExit: print('MODULES', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    text, _, loaded = done.stdout.partition("MODULES")
    return text, set(loaded.split())


def seconds_of(root, *words):
    """Least of three runs of Python with these words."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, *words], cwd=root, capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(root, name):
    """Help imports no torch and no timm, shows a default in every row, and ends with an example."""
    text, loaded = help_of(root, name)
    assert not loaded & {"torch", "timm", "numpy", "diffusers"}
    assert "README" not in text
    groups, _, example = text.partition("\nexample:\n")
    assert f"{name}.py" in example
    rows = re.split(r"\n  (?=-|REF|SAMPLE|RUN|FILE|\{)", groups.partition("input and output:")[2])[1:]
    rows = [re.sub(r"\s+", " ", row) for row in rows]
    assert len(rows) == len(command_of(name).flags())
    assert not [row for row in rows if not re.search(r"default: .*\)|\(required\)|no effect", row)]


def test_help_is_quick(root):
    """The slowest help takes less than a quarter of the time of importing torch."""
    bare = seconds_of(root, "-c", "import torch")
    assert max(seconds_of(root, f"{name}.py", "--help") for name in SCRIPTS) < bare / 4


@pytest.mark.parametrize("name", SCRIPTS)
def test_own_flags_come_first(name):
    """Within every group of help, the script's own flags are above shared ones."""
    command = command_of(name)
    own = {flag.option for flag in command.own}
    for group in {flag.group for flag in command.flags()}:
        is_own = [flag.option in own for flag in command.flags() if flag.group == group]
        assert is_own == sorted(is_own, reverse=True)


@pytest.mark.parametrize(
    ("typed", "near"),
    [("--modle", "--model"), ("--global-batchsize", "--global-batch-size"), ("--loadweight=x", "--load-weight")],
)
def test_mistyped_flags(capsys, typed, near):
    """One line with the nearest flag, whatever else is missing."""
    with pytest.raises(SystemExit) as caught:
        command_of("train").parse([typed, "3"])
    assert caught.value.code == 2
    name = typed.partition("=")[0]
    assert capsys.readouterr().err == f"train.py: error: {name}: there is no such flag; did you mean {near}?\n"


def test_unknown_flag(capsys):
    with pytest.raises(SystemExit):
        command_of("train").parse(["--zzzzzzzzz"])
    assert capsys.readouterr().err == "train.py: error: --zzzzzzzzz: there is no such flag; --help lists the flags\n"


@pytest.mark.parametrize("name", SCRIPTS)
def test_flags_have_readers(root, name):
    """Every flag is read by the script, by a dataclass that it makes from settings, or where runs start."""
    shared = [*sorted((root / "engine").glob("*.py")), root / "pruning/gates.py", root / "evaluation/evaluate.py"]
    text = "\n".join(path.read_text() for path in [root / f"{name}.py", *shared])
    command = command_of(name)
    dests = {flag.dest for flag in (*command.own, *command.shared)}
    unread = [dest for dest in dests if not re.search(rf"settings\.{dest}\b|(?m:^    {dest}: )|\"{dest}\"", text)]
    assert not unread


ALTERNATIVES = ("--kept-indices", "--n-pruned")  # to --scheme and --pattern


@pytest.mark.parametrize(
    "name",
    [name for name in SCRIPTS if name not in ("evaluator", "report_runs", "inspect_weights", "export_diffusers")],
)
def test_published_flags(root, name):
    """Flags, defaults, kinds and choices are the published ones, or more; some that were required have alternatives."""
    found = {flag.option: flag for flag in command_of(name).flags()}
    for published in json.loads((root / "tests/golden/script_flags.json").read_text())[name]:
        for option in published["name"]:
            if option.startswith("--no-") and option not in found:
                assert found[published["name"][0]].opposite
                continue
            flag = found[option]
            assert flag.help.strip(), option
            assert flag.default == published["default"], option
            assert flag.required == (published["required"] and option not in ALTERNATIVES), option
            assert (flag.switch or flag.opposite) == (published["type"] == "flag"), option
            if published["type"] != "flag" and published["nargs"] != "+":
                assert flag.nargs == published["nargs"], option
            if isinstance(published["choices"], list) and option not in ("--vae", "--image-size"):
                assert set(published["choices"]) <= set(flag.choices), option


PUBLISHED = [
    ("extract_features", "--model DiT-XL/2 --data-path D --features-path F"),
    (
        "prune_by_learning",
        "--model DiT-XL-1-2 --load-weight W --data-path F --epochs 1 --global-batch-size 128 --delta-w --lora "
        "--save-model O",
    ),
    ("prune_by_score", "--model DiT-XL/2 --ckpt W --save-model O --n-pruned 14"),
    (
        "prune_by_index",
        "--model DiT-XL/2 --ckpt W --kept-indices [0,2,4,6,8,10,12,14,17,19,21,23,25,27] --save-model O",
    ),
    ("train", "--model DiT-D14/2 --load-weight O --data-path F --epochs 100 --prefix P"),
    (
        "train_masked_kd",
        "--model DiT-D14/2 --load-weight O --data-path F --epochs 100 --prefix P --teacher DiT-XL/2 --load-teacher W",
    ),
    ("sample_ddp", "--model DiT-D14/2 --ckpt outputs/D14/checkpoints/0500000.pt"),
    ("sample", "--model DiT-D14/2 --ckpt W --seed 5464"),
]


@pytest.mark.parametrize(("name", "command"), PUBLISHED, ids=[name for name, _ in PUBLISHED])
def test_published_command_lines(root, name, command):
    """They parse as they stand; what they do not name has the published default."""
    words = command.split()
    values = command_of(name).defaults() | command_of(name).parse(words)
    for flag in json.loads((root / "tests/golden/script_flags.json").read_text())[name]:
        dest = flag["name"][0].removeprefix("--").replace("-", "_")
        if flag["name"][0] not in words:
            assert values[dest] == flag["default"], dest
        elif flag["type"] != "flag" and dest != "kept_indices":
            assert str(values[dest]) == words[words.index(flag["name"][0]) + 1]


def test_kept_indices_as_users_have_them():
    indices = "[0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27]"
    typed = command_of("prune_by_index").parse(["--ckpt", "W", "--kept-indices", indices])
    assert typed["kept_indices"] == json.loads(indices)
