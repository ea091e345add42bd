"""Requirements and their lock, what the set-up of the walkthrough leaves out, and files about the project."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from functools import cache

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from test_form import imports, sources

FILES = ("requirements.txt", "requirements-demo.txt", "requirements-prompts.txt", "requirements-dev.txt")
PLATFORM = ("nvidia", "cuda", "triton")  # of torch's build, which pins them itself
OPTIONAL = {"tensorflow", "tensorboard", "wandb"}  # imported where a flag asks for them
PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn"}  # of modules of another name


def requirements(root, name):
    """{package: Requirement} of a file and of those that it includes."""
    found = {}
    for line in (root / name).read_text().splitlines():
        if line.startswith("-r "):
            found |= requirements(root, line[3:].strip())
        elif line.strip() and not line.startswith("#"):
            requirement = Requirement(line)
            found[canonicalize_name(requirement.name)] = requirement
    return found


def locked(root):
    """{package: Version} of the lock."""
    lines = [line for line in (root / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.!]+", line) for line in lines)
    return {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}


@cache
def find_installed(name):
    """The distribution, or None."""
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@pytest.mark.parametrize("name", FILES)
def test_ranges(root, name):
    """From a version that is named to below the next major one, in the newest file as well as in those it includes."""
    for requirement in requirements(root, name).values():
        bounds = {each.operator: each.version for each in requirement.specifier}
        assert set(bounds) == {">=", "<"}, requirement
        assert re.fullmatch(r"[0-9]+", bounds["<"]), requirement
        assert Version(bounds[">="]) < Version(bounds["<"]), requirement


def test_lock_satisfies_requirements(root):
    versions = locked(root)
    wrong = [str(each) for name, each in requirements(root, FILES[-1]).items() if versions[name] not in each.specifier]
    assert not wrong


def test_lock_is_whole(root):
    """What is installed in a locked version needs, in turn, only what is locked; torch's build has its own pins."""
    if sys.version_info < (3, 11):
        pytest.skip("the lock is for Python 3.11 or newer")
    versions, missing = locked(root), set()
    for name, version in versions.items():
        found = find_installed(name)
        if found is None or Version(found.version).public != version.public:
            continue
        for text in found.requires or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                missing.add(canonicalize_name(needed.name))
    missing -= set(versions)
    assert not {name for name in missing if not name.startswith(PLATFORM)}


def test_lock_names_no_build_for_one_platform(root):
    assert not [name for name in locked(root) if name.startswith(PLATFORM)]


def test_installed_versions_are_in_their_ranges(root):
    for name, requirement in requirements(root, FILES[0]).items():
        assert find_installed(name).version in requirement.specifier, requirement


def imported(root, *left_out):
    """Packages from outside that the project's files import, but those of some folders and what is optional."""
    files = [
        path
        for path in sources(root)
        if not any(path.relative_to(root).as_posix().startswith(f"{folder}/") for folder in left_out)
    ]
    ours = {path.stem for path in sources(root)} | {path.name for path in root.iterdir() if path.is_dir()}
    names = {name.split(".")[0] for path in files for name in imports(path)} - ours - set(sys.stdlib_module_names)
    return {canonicalize_name(PACKAGES.get(name, name)) for name in names - OPTIONAL}


def test_what_is_imported_is_required(root):
    """By what is run in earnest, the walkthroughs and the benchmarks; the first requires no more than it imports."""
    runtime, demo, prompts, everything = (set(requirements(root, name)) for name in FILES)
    assert imported(root, "benchmarks", "examples") == runtime
    assert imported(root, "benchmarks", "examples/prompts") <= demo
    assert imported(root, "benchmarks") <= prompts
    assert imported(root) <= everything
    pictures = {name.split(".")[0] for name in imports(root / "benchmarks" / "pictures.py")}  # for the walkthrough
    assert {name for name in pictures if find_installed(name)} <= demo


@pytest.mark.parametrize("target", ["demo", "demo-sit", "demo-mar", "demo-t2i", "test", "bench"])
@pytest.mark.parametrize("lock", ["", "requirements.lock"])
def test_what_targets_install(root, target, lock):
    """The walkthroughs do without TensorFlow and the like; a lock holds for all of it."""
    if not shutil.which("make"):
        pytest.skip("needs make")
    command = ["make", "--dry-run", "--always-make", f"LOCK={lock}", target]
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
    shown = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=True).stdout
    installs = [line.split(" -r ")[1] for line in shown.splitlines() if "pip install" in line]
    usual = "requirements-demo.txt" if target.startswith("demo") else "requirements-dev.txt"
    file = {"demo-t2i": "requirements-prompts.txt"}.get(target, usual)
    assert [text.split() for text in installs] == [[file, *(["-c", lock] if lock else [])]]


def test_walkthrough_is_small(root):
    heavy = {"tensorflow-cpu", "torch-fidelity", "wandb", "tensorboard", "selenium", "mlxtend"}
    assert not heavy & set(requirements(root, FILES[1]))
    assert heavy <= set(requirements(root, FILES[-1]))


def test_readme_names_requirements(root):
    """In the section on requirements, each as a word of its own."""
    section = (root / "README.md").read_text().partition("\n## Requirements\n")[2].partition("\n## ")[0]
    words = set(re.findall(r"[A-Za-z0-9_-]+", section))
    assert not {each.name for each in requirements(root, FILES[-1]).values()} - words
    assert all(name in section for name in (*FILES, "requirements.lock"))


def test_citation(root):
    """It is what the format asks for, of this version and the paper."""
    cited = yaml.safe_load((root / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert cited["license"] == (root / "LICENSE").read_text().split()[0]
    assert f'version = "{cited["version"]}"' in (root / "pyproject.toml").read_text()
    paper = cited["preferred-citation"]
    assert {"type", "title", "authors"} <= set(paper)
    assert [each["family-names"] for each in paper["authors"]] == ["Fang", "Li", "Ma", "Wang"]
    assert "2412.01199" in paper["url"]


def test_public_workflow(root):
    """It runs the README's command, from the lock where there is one for the version of Python."""
    workflow = yaml.safe_load((root / ".github" / "workflows" / "test.yml").read_text())
    job = workflow["jobs"]["test"]
    assert [step["run"] for step in job["steps"] if "make test" in step.get("run", "")]
    matrix = job["strategy"]["matrix"]
    assert matrix["lock"] == ["requirements.lock"]
    assert "3.11" in matrix["python"]
    assert "make test LOCK=requirements.lock" in (root / ".ci" / "run").read_text()


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_named_files_exist(root, page):
    """Files and folders of the project that a page names."""
    named = re.findall(
        r"`((?:[A-Za-z0-9_.-]+/)*(?:[A-Za-z0-9_-]+\.(?:py|md|txt|lock|cff|sh|json|yml))?)`", (root / page).read_text()
    )
    assert named
    assert not [name for name in named if not (root / name).exists()]
