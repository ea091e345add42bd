"""Two hosts with a network of their own, folders of their own, and a link between them that can be cut.

Only where the environment variable HOSTS is set, and by a user who may make network namespaces.
"""

import os
import shutil
import subprocess
import time

import pytest
from disturbed import check_same, contents, extraction_words, sampling_words, training_words
from network import ADDRESSES, PORT, Network

pytestmark = pytest.mark.skipif("HOSTS" not in os.environ, reason="slow: set HOSTS to run it")
SECONDS = 30  # until both hosts have ended that were started differently
SHORT = 20  # seconds for an exchange where the link is cut, in place of engine.distributed's ten minutes
WITH_SHORT_TIMEOUT = f"""
import os, runpy, sys
from datetime import timedelta
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import engine.distributed
engine.distributed.TIMEOUT = timedelta(seconds={SHORT})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def network():
    """Two joined hosts, which are removed afterwards."""
    try:
        made = Network()
    except OSError as error:
        pytest.skip(str(error))
    yield made
    made.close()


@pytest.fixture
def copies(teacher, latents, pictures, tmp_path):
    """What the second host reads: copies under other paths. {path: copy}."""
    found = {}
    for path in (teacher.weights, teacher.student, latents, pictures):
        copy = tmp_path / "second" / path.name
        copy.parent.mkdir(exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, copy)
        else:
            shutil.copy(path, copy)
            shutil.copy(f"{path}.json", f"{copy}.json")
        found[str(path)] = str(copy)
    return found


def end(processes, seconds=240):
    """(what each has shown, its status) of processes that have this long to end."""
    limit, shown = time.monotonic() + seconds, []
    for process in processes:
        try:
            text, _ = process.communicate(timeout=max(1, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"host still runs after {seconds} s") from None
        shown.append((text, process.returncode))
    return shown


def run_on_two(network, words, copies, private=None, **options):
    """Run a script on both hosts to its end; the second reads copies. private: what each has in place of a folder."""
    words = [str(word) for word in words]
    second = [copies.get(word, word) for word in words]
    mounts = private or (None, None)
    processes = [network.start(k, each, mounts[k], **options) for k, each in enumerate((words, second))]
    return end(processes)


def check_done(shown):
    """Both ended well. A launcher may say that the other was gone before it in the end, which does no harm."""
    for text, status in shown:
        assert status == 0, text[-3000:]
        assert not [line for line in text.splitlines() if line.startswith("Traceback") or ".py: error: " in line]


def own_folders(tmp_path):
    """A folder that is another one on each host: (its path, [(path, host's folder), ...])."""
    common = tmp_path / "local"
    folders = [tmp_path / f"disk-{k}" for k in range(2)]
    for folder in (common, *folders):
        folder.mkdir()
    return common, [(common, folder) for folder in folders]


def check_one_host(launch, words):
    done = launch(2, *words)
    assert done.returncode == 0, done.stderr[-3000:]


def results(folder):
    """What a run has written, without the paths of its host in config.json and in the states' facts."""
    found = contents(folder)
    return {name: value for name, value in found.items() if not name.endswith(".json")}


def check_run(found, expected):
    """Two runs made the same: metrics, pruned weights, and in the states all but the recorded settings."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        mine = found[name]
        if isinstance(value, dict):
            mine, value = ({k: v for k, v in each.items() if not k.startswith(".args")} for each in (mine, value))
        assert mine == value, name


@pytest.mark.parametrize("name", ["prune_by_learning", "train_masked_kd"])
def test_training(network, launch, teacher, latents, copies, tmp_path, name):
    """Data and weights as copies under other paths, run folders on disks of the hosts: the bytes of one host."""
    folder, private = own_folders(tmp_path)
    check_done(run_on_two(network, training_words(name, teacher, latents, folder), copies, private))
    check_one_host(launch, training_words(name, teacher, latents, tmp_path / "one"))
    check_run(results(tmp_path / "disk-0"), results(tmp_path / "one"))
    assert list((tmp_path / "disk-1").iterdir()) == []  # only the main process writes


def test_extraction(network, launch, pictures, copies, tmp_path):
    """Both write to a shared folder."""
    check_done(run_on_two(network, extraction_words(pictures, tmp_path / "two"), copies))
    check_one_host(launch, extraction_words(pictures, tmp_path / "one"))
    check_same(contents(tmp_path / "two"), contents(tmp_path / "one"))


def test_sampling(network, launch, teacher, copies, tmp_path):
    """Both write to a shared folder."""
    check_done(run_on_two(network, sampling_words(teacher, tmp_path / "two"), copies))
    check_one_host(launch, sampling_words(teacher, tmp_path / "one"))
    check_same(contents(tmp_path / "two"), contents(tmp_path / "one"))


@pytest.mark.parametrize("name", ["extract_features", "sample_ddp"])
def test_folder_is_not_shared(network, teacher, pictures, copies, tmp_path, name):
    """Another folder under the same path on the second host: refused on both, soon."""
    folder, private = own_folders(tmp_path)
    words = {"extract_features": extraction_words(pictures, folder), "sample_ddp": sampling_words(teacher, folder)}
    began = time.monotonic()
    shown = run_on_two(network, words[name], copies, private)
    seconds = time.monotonic() - began
    print(f"{name}: {seconds:.1f} s")
    assert all(status for _, status in shown)
    errors = [line for text, _ in shown for line in text.splitlines() if ".py: error: " in line]
    assert len(errors) == 2, errors  # one on each host
    assert all("process 1 does not see what the main process writes there" in error for error in errors)
    assert seconds < SECONDS


def wait_for_state(folder, seconds=120):
    """Wait until the first state of a run is there."""
    limit = time.monotonic() + seconds
    while not list(folder.glob("*/checkpoints/*.pt")):
        assert time.monotonic() < limit, "no state came"
        time.sleep(0.02)


@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_cut_link(network, launch, teacher, latents, tmp_path, rendezvous):
    """Both hosts stop after the time for an exchange; the same command continues to the same bytes."""
    script = tmp_path / "short.py"
    script.write_text(WITH_SHORT_TIMEOUT)
    words = [*training_words("train", teacher, latents, tmp_path / "two"), "--epochs", "20"]
    processes = start_both(network, words, rendezvous, script)
    wait_for_state(tmp_path / "two")
    network.set_link("down")
    began = time.monotonic()
    shown = end(processes[: 1 if rendezvous == "c10d" else 2], 6 * SHORT)
    print(f"{rendezvous}: ended {time.monotonic() - began:.0f} s after the cut")
    network.set_link("up")
    shown += end(processes[len(shown) :], 6 * SHORT)  # a launcher of c10d that waits for the store of the first host
    assert all(status for _, status in shown)
    check_done(end(start_both(network, words, rendezvous)))
    one = [*training_words("train", teacher, latents, tmp_path / "one"), "--epochs", "20"]
    check_one_host(launch, one)
    check_run(results(tmp_path / "two"), results(tmp_path / "one"))


def start_both(network, words, rendezvous, script=None):
    """The launchers of both hosts, which find each other in one of torchrun's two ways."""
    found = []
    for k in range(2):
        launcher = ("--rdzv_backend=c10d", f"--rdzv_endpoint={ADDRESSES[0]}:{PORT}", "--rdzv_id=test")
        # Here names of hosts lead nowhere.
        launcher += (f"--rdzv_conf=is_host={int(k == 0)}", f"--local_addr={ADDRESSES[k]}")
        found.append(network.start(k, words, launcher=launcher if rendezvous == "c10d" else (), script=script))
    return found
