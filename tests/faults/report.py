"""What the results of many cases look like: a summary for the screen, and tables in Markdown."""

import re
from collections import Counter

SHOWN = 160  # characters of a message in a table
ROWS = 5  # cases of a kind on a page
MARK = "<!-- What follows is written by tests/faults/run.py --page. -->"


def kind_of(reason):
    """The first word or two of a reason, without what differs from case to case."""
    return "as expected" if not reason else reason.partition(": ")[0] if reason.startswith("wrote") else reason


def summary(results):
    """Counts by script and by kind, and the list of cases that failed."""
    lines = []
    for title, name in (("script", "script"), ("kind", "kind")):
        rows = sorted({getattr(result, name) for result in results})
        lines.append(f"\n{title:28}  cases  failed")
        for row in rows:
            those = [result for result in results if getattr(result, name) == row]
            lines.append(f"{row:28} {len(those):6} {sum(bool(result.reason) for result in those):7}")
    reasons = Counter(kind_of(result.reason) for result in results)
    lines += ["", "answers:", *(f"{count:6}  {reason}" for reason, count in reasons.most_common())]
    failed = [result for result in results if result.reason]
    lines += ["", f"{len(failed)} of {len(results)} cases failed"]
    for result in failed:
        detail = " | ".join(filter(None, [result.message[:200], result.where]))
        lines.append(f"  {result.name}: {result.reason}" + (f"  [{detail}]" if detail else ""))
    return "\n".join(lines)


def table(results, rows=None):
    """A table in Markdown per kind: what was given, what was answered, and the exit status; of so many of its cases."""
    lines = []
    for kind in sorted({result.kind for result in results}):
        lines += [f"### {kind}", "", "| input | answer | status |", "|---|---|---|"]
        those = [result for result in results if result.kind == kind]
        for result in those[:: -(-len(those) // (rows or len(those)))]:
            lines.append(f"| {cell(given(result))} | {cell(answer(result))} | {shown_status(result)} |")
        lines.append("")
    return "\n".join(lines)


def counts(results):
    """A table in Markdown: of every kind, how many cases were refused, went on, and were answered wrongly."""
    lines = [
        "| kind | cases | refused with one line | went on as it should | answered wrongly |",
        "|---|---|---|---|---|",
    ]
    for kind in sorted({result.kind for result in results}):
        those = [result for result in results if result.kind == kind]
        wrong = sum(bool(result.reason) for result in those)
        refused = sum(bool(result.status) and not result.reason for result in those)
        lines.append(f"| {kind} | {len(those)} | {refused} | {len(those) - wrong - refused} | {wrong} |")
    return "\n".join(lines)


def fill_page(path, results):
    """Write counts, and some answers of every kind, behind the marker of a page."""
    head, mark, _ = path.read_text().partition(MARK)
    path.write_text(f"{head}{mark}\n\n{counts(results)}\n\n{table(results, ROWS)}")


def given(result):
    """The command line, or of a damaged file the script and what is wrong with the file."""
    name = result.name
    return name if len(name) < SHOWN else name[: SHOWN - 4] + " ..."


def answer(result):
    """The message, shortened, or what happened instead of one."""
    if result.reason:
        return f"**{result.reason}** {result.message}"
    return result.message or "goes on"


def shown_status(result):
    return "-" if result.status is None else result.status


def cell(text):
    """Text as a cell of a table: one line, shortened, without temporary folders and signs that Markdown reads."""
    text = " ".join(text.encode(errors="backslashreplace").decode().split())
    text = re.sub(r"[^\s'\"]*/case-[^/]+/place/", "", text)
    text = text if len(text) <= SHOWN else text[: SHOWN - 4] + " ..."
    text = text.replace("|", r"\|").replace("<", "&lt;")
    return text if text.startswith("**") else text.replace("*", r"\*")
