"""The GPU table of docs/performance.md, out of the results: `python -m benchmarks.gpu.report`."""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[2] / "docs/performance.md"
START, END = "<!-- tables by benchmarks/gpu/report.py -->", "<!-- end of these tables -->"
HEAD = """| work | form | a second | against the first | share of matmul | GB | first call |
|---|---|---|---|---|---|---|"""


def format_machine(machine):
    """What the numbers of a file were measured on."""
    return (
        f"{machine['device']}, driver {machine['driver']}, torch {machine['torch']}, Python {machine['python']}, "
        f"processor {machine['cpu']}; {machine['date'][:10]}{'; ' + machine['note'] if 'note' in machine else ''}"
    )


def format_case(case):
    """Rows of a case, a form each: the work is named once."""
    for place, (name, row) in enumerate(case["sides"].items()):
        speedup = f"{row['speedup']:.2f}x ({row['least']:.2f} to {row['most']:.2f})" if place else "1"
        cells = [case["case"] if not place else "", name, f"{row['rate']:.1f}", speedup]
        gb = "-" if row.get("gb") is None else f"{row['gb']:.1f}"
        cells += [f"{row['efficiency']:.2f}", gb, f"{row['first_call']:.0f} s"]
        yield f"| {' | '.join(cells)} |"


def format_result(result):
    """The section of one machine."""
    lines = [f"### {result['machine']['device']}", "", format_machine(result["machine"]), ""]
    lines += [f"- {claim}: {found['summary']}" for claim, found in result["claims"].items()]
    lines += ["", HEAD, *(row for case in result["cases"] for row in format_case(case))]
    return "\n".join(lines)


def format_results(results):
    """All sections; without results the words "not run"."""
    return "\n\n".join(map(format_result, results)) or "Not run on a GPU yet."


def read_results(folder=RESULTS):
    """What was measured, a file a machine, by its name."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def write_page(page=PAGE, folder=RESULTS):
    """Put the tables in their place."""
    before, rest = page.read_text().split(START)
    _, after = rest.split(END)
    page.write_text(f"{before}{START}\n\n{format_results(read_results(folder))}\n\n{END}{after}")


if __name__ == "__main__":
    write_page()
