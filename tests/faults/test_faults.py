"""A fixed sample of the wrong command lines and damaged files, and that the harness sees what it should see.

All of them: python tests/faults/run.py
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from faults import harness, report
from faults.harness import Case

HERE = Path(__file__).resolve().parent
SAMPLE = 60

FAKE = """
import os, sys, time
from pathlib import Path
from engine.errors import InputError
from engine.weight_files import read_file
parse_args = list
def main(words):
    what = words[0]
    if what == "raises": raise KeyError("groups")
    if what == "waits": time.sleep(60)
    if what == "waits in C": open("in/fifo")
    if what == "dies": os.kill(os.getpid(), 9)
    if what == "writes": Path("new").touch()
    if what == "changes": Path("in/input").write_text("b")
    if what == "runs": os.mkdir("payload-ran")
    if what == "exits": sys.exit("error: --flag")
    if what == "ends": sys.exit(0)
    if what == "asks":
        import urllib.request
        try: urllib.request.urlopen("http://example.invalid")
        except Exception: pass
    if what == "notes": print("left out --flag"); return
    texts = {"says nothing": "", "several lines": "--flag\\nis wrong", "names nothing": "it is wrong"}
    if what != "returns": raise InputError(texts.get(what, "--flag is wrong"))
"""
SEEN = {
    "refuses": "",
    "exits": "",
    "returns": "accepted",
    "ends": "accepted",
    "raises": "traceback: KeyError",
    "waits": "hang",
    "waits in C": "hang",
    "dies": "died: SIGKILL",
    "writes": "wrote: new",
    "changes": "wrote: in/input",
    "runs": "payload ran",
    "asks": "asked the network: example.invalid",
    "says nothing": "says nothing",
    "several lines": "several lines",
    "names nothing": "does not name it",
}


def make_inputs(folder):
    """An input, and a FIFO."""
    import os

    (folder / "in" / "input").write_text("a")
    os.mkfifo(folder / "in" / "fifo")


@pytest.fixture
def run_fake(tmp_path, monkeypatch):
    """Runs a case of a script that does what its word says."""
    (tmp_path / "fake_script.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path)

    def run(word, **options):
        return harness.run_case(
            Case(word, "fakes", "fake_script", (word,), ("--flag",), make_inputs, **options), tmp_path, seconds=1
        )

    return run


@pytest.mark.parametrize("word", SEEN)
def test_what_the_harness_sees(run_fake, word):
    assert run_fake(word).reason == SEEN[word]


def test_what_may_be_written(run_fake):
    assert not run_fake("writes", may_write=("new",)).reason


def test_survivors(run_fake):
    """They end as always and say what is expected; a refusal is a failure."""
    assert not run_fake("notes", expected=harness.SURVIVES, says="left out").reason
    assert run_fake("notes", expected=harness.SURVIVES, says="repaired").reason == "says nothing"
    assert run_fake("refuses", expected=harness.SURVIVES).reason == "refused"
    assert not run_fake("refuses", expected=harness.EITHER).reason
    spoilt = run_fake("returns", expected=harness.SURVIVES, check=lambda folder: "labels moved")
    assert spoilt.reason == "made something else: labels moved"


def test_tables(run_fake):
    results = [run_fake("refuses"), run_fake("returns")]
    text = report.table(results)
    assert "| refuses | --flag is wrong | 1 |" in text
    assert "| returns | **accepted** | 0 |" in text
    assert "1 of 2 cases failed" in report.summary(results)


def test_sample(tmp_path):
    """Every case of the sample is answered as it should be."""
    out = tmp_path / "results.json"
    command = [sys.executable, HERE / "run.py", "--sample", str(SAMPLE), "--jobs", "2", "--seconds", "10"]
    command += ["--quiet", "--json", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.exists(), done.stderr[-3000:]
    results = json.loads(out.read_text())
    assert len(results) == SAMPLE
    assert not [f"{result['name']}: {result['reason']}" for result in results if result["reason"]]
