"""How many inputs every parser gets, and the count of them at the end.

A short form runs with the other tests, the same inputs every time. `make fuzz` sets FUZZ_EXAMPLES for a long one, which
draws others every time, in rounds that show how far it is.
"""

import os

import pytest
from hypothesis import HealthCheck, Phase, settings

from .limits import TRIED

SHORT, ROUND = 60, 10_000
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", SHORT))
IS_LONG = "FUZZ_EXAMPLES" in os.environ

settings.register_profile(
    "fuzz",
    max_examples=min(EXAMPLES, ROUND),
    derandomize=not IS_LONG,
    database=None,
    deadline=None,
    print_blob=True,
    phases=set(Phase) - {Phase.explain},
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("fuzz")


def pytest_generate_tests(metafunc):
    """A long run is cut into rounds: each frees what hypothesis remembers, and shows as one line."""
    if "part" in metafunc.fixturenames:
        metafunc.parametrize("part", range(-(-EXAMPLES // ROUND)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for the files of one module, which every input overwrites."""
    return tmp_path_factory.mktemp("fuzz")


def pytest_terminal_summary(terminalreporter):
    """Inputs, accepted ones and rate of every parser."""
    if IS_LONG and TRIED:
        terminalreporter.section("inputs tried")
        for name, (tried, accepted, seconds) in TRIED.items():
            shares = f"{accepted / tried:6.1%} accepted, {tried / max(seconds, 1e-9):7,.0f} a second inside the parser"
            terminalreporter.write_line(f"{name:28} {tried:9,} inputs, {shares}")
