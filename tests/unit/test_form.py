"""The form of the project: who imports whom, how long things are, and that every flag has help and a reader."""

import argparse
import ast
import importlib
import json
import re
import sys
from unittest.mock import patch

import pytest

NAMES = "extract_features prune_by_learning prune_by_score prune_by_index train train_masked_kd sample sample_ddp"
SCRIPTS = NAMES.split()
OURS = {"pruning", "diffusion", "engine", "models", "families", "evaluation", "models_mar"}
THIRD = {"torch", "numpy", "tqdm", "timm", "PIL", "diffusers", "safetensors", "scipy", "torchvision", "sklearn"}
ALLOWED = {  # part -> modules it may import besides the standard library
    "pruning": {"torch", "pruning"},
    "diffusion": {"torch", "numpy", "tqdm", "diffusers", "torchdiffeq", "diffusion"},
    "models.py": {"torch", "timm", "pruning.gates"},
    "models_mar.py": {"torch", "timm", "models", "pruning.gates", "pruning.patterns"},
    "families.py": {"torch", "models", "models_mar", "diffusion", "pruning.gates"},
    "evaluation": {"torch", "torchvision", "numpy", "scipy", "tqdm", "PIL", "tensorflow", "evaluation"},
    "engine": (OURS | THIRD) - {"pruning", "models", "models_mar"},
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
    files = [root / part] if part.endswith(".py") else sorted((root / part).glob("*.py"))
    assert files
    wrong = {(f.name, module) for f in files for module in imports(f) if not is_allowed(module, ALLOWED[part])}
    assert not wrong


def test_nobody_imports_a_script(root):
    wrong = {(f.name, module) for f in sources(root) for module in imports(f) if module.split(".")[0] in SCRIPTS}
    assert not wrong


def test_only_the_engine_names_devices(root):
    """`cuda` is named in two files; elsewhere only where memory is pinned or gradients are scaled."""
    found = set()
    for path in sources(root):
        if path.relative_to(root).as_posix() in ("engine/run.py", "engine/distributed.py"):
            continue
        lines = path.read_text().splitlines()
        for node in ast.walk(ast.parse(path.read_text())):
            named = getattr(node, "attr", None) == "cuda" or getattr(node, "value", None) == "cuda"
            if named and not re.search("pin_memory|GradScaler", lines[node.lineno - 1]):
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


def test_length_of_the_project(root):
    """Lines that are not blank, of everything but the tests and the evaluator with its benchmarks."""
    evaluator = {"evaluation", "evaluator.py", "benchmarks"}
    files = [path for path in sources(root) if path.relative_to(root).parts[0] not in evaluator]
    lines = [line for path in files for line in path.read_text().splitlines() if line.strip()]
    assert len(lines) <= 4300


@pytest.mark.parametrize("name", SCRIPTS)
def test_length_of_scripts(root, name):
    assert len((root / f"{name}.py").read_text().splitlines()) <= 120


def test_length_of_functions(root):
    long = [
        (path.name, node.name, node.end_lineno - node.lineno + 1)
        for path in sources(root)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 46
    ]
    assert not long


def parser_of(name):
    """The parser that a script builds."""

    class Built(Exception):
        pass

    def stop(parser, argv=None):
        raise Built(parser)

    with patch.object(argparse.ArgumentParser, "parse_args", stop), pytest.raises(Built) as caught:
        importlib.import_module(name).parse_args([])
    return caught.value.args[0]


def actions(parser):
    return {o: action for action in parser._actions for o in action.option_strings if o not in ("-h", "--help")}


@pytest.mark.parametrize("name", SCRIPTS)
def test_flags_have_help(name):
    assert not [flag for flag, action in actions(parser_of(name)).items() if not (action.help or "").strip()]


@pytest.mark.parametrize("name", SCRIPTS)
def test_flags_have_readers(root, name):
    """Every flag is read by the script or the engine, or reported as having no effect."""
    parser = parser_of(name)
    shared = [root / "families.py", *sorted((root / "engine").glob("*.py"))]
    text = "\n".join(path.read_text() for path in [root / f"{name}.py", *shared])
    dests = {action.dest for action in actions(parser).values()} - set(parser.get_default("unused") or ())
    assert not [dest for dest in dests if not re.search(rf"args\.{dest}\b|getattr\(args, \"{dest}\"", text)]


@pytest.mark.parametrize("name", SCRIPTS)
def test_published_flags(root, name):
    """Flags, defaults, kinds and choices are the published ones, or more."""
    found = actions(parser_of(name))
    for flag in json.loads((root / "tests/golden/script_flags.json").read_text())[name]:
        for option in flag["name"]:
            assert option in found
            action = found[option]
            if option.startswith("--no-") and len(flag["name"]) > 1:
                assert (action.nargs, action.dest) == (0, flag["name"][0].removeprefix("--"))
                continue
            assert action.default == flag["default"], option
            assert action.required == (flag["required"] and option != "--kept-indices"), option
            assert (action.nargs == 0) == (flag["type"] == "flag"), option
            assert action.nargs == flag["nargs"] or flag["type"] == "flag", option
            if isinstance(flag["choices"], list) and option not in ("--vae", "--image-size"):
                assert set(flag["choices"]) <= set(action.choices), option


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
def test_published_command_lines(root, tmp_path, monkeypatch, name, command):
    """They parse as they stand; what they do not name has the published default."""
    monkeypatch.chdir(tmp_path)
    words = command.split()
    args = importlib.import_module(name).parse_args(words)
    for flag in json.loads((root / "tests/golden/script_flags.json").read_text())[name]:
        dest = flag["name"][0].removeprefix("--").replace("-", "_")
        value = getattr(args, dest)
        if flag["name"][0] not in words:
            assert value == flag["default"], dest
        elif flag["type"] != "flag" and dest != "kept_indices":
            assert str(value) == words[words.index(flag["name"][0]) + 1]


def test_kept_indices_as_users_have_them():
    indices = "[0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27]"
    args = importlib.import_module("prune_by_index").parse_args(["--ckpt", "W", "--kept-indices", indices])
    assert args.kept_indices == json.loads(indices)
