"""The report, of made-up run folders: all that is there is shown, all that is missing is said, nothing is trusted."""

import base64
import importlib.util
import json
import math
import re
import struct
import xml.etree.ElementTree as ElementTree
import zlib
from html.parser import HTMLParser

import pytest

import report_runs
from benchmarks import pictures
from engine.errors import InputError
from reporting import charts, figures
from reporting.markup import Markup, element
from reporting.page import build_page
from reporting.parts import Options
from reporting.pictures import embed_picture
from reporting.runs import name_apart, read_run
from reporting.tables import count_pattern, find_sizes
from reporting.values import as_number, show, show_change, show_tick, spread, thin

EVIL = "\"'><script>alert(1)</script><img src=https://evil.example/x>&amp;"
SETTINGS = {"model": "DiT-T/2", "lr": 1e-4, "epochs": 2, "pattern": None, "save_model": None}
ORIGINS = {"model": "typed", "lr": "default", "epochs": "data/metadata.json", "pattern": "default"}
PROFILE = {
    "device": "cpu",
    "precision": "fp32",
    "before": {"parameters": 2000, "gmacs": 1.5, "latency_ms": 20.0, "memory_gb": None},
    "after": {"parameters": 1000, "gmacs": 0.75, "latency_ms": 12.0},
}


def picture(width=4, height=3):
    """The bytes of a black PNG."""

    def part(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + bytes(3 * width) for _ in range(height)))
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", size) + part(b"IDAT", rows) + part(b"IEND", b"")


def write_run(path, rows=(), samples=(), settings=(), **files):
    """Write a run folder. files: {name with __ for a slash and _json for its end: JSON}."""
    path.mkdir(parents=True)
    config = {"settings": {**SETTINGS, **dict(settings)}, "origins": ORIGINS, "sizes": {"steps": 40}}
    config["environment"] = {"command": "train.py --model DiT-T/2 --data-path 'a b'", "device": "cpu", "processes": 2}
    (path / "config.json").write_text(json.dumps(config))
    if rows:
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in samples:
        (path / "samples").mkdir(exist_ok=True)
        (path / "samples" / f"{step:07d}.png").write_bytes(picture())
    for name, values in files.items():
        file = path / (name.replace("__", "/").removesuffix("_json").replace("_pt", ".pt") + ".json")
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(values))
    return path


def gate_rows(depth, steps=5):
    """Rows of gates over 1:2 that become surer of the even layers."""
    rows = []
    for k in range(steps):
        share = 0.5 + 0.4 * k / steps
        row = {"step": 10 * k, "kept": list(range(0, depth, 2)), "confidence": [share] * (depth // 2)}
        row["keep_probability"] = [share, 1 - share] * (depth // 2)
        rows.append(row | ({"loss": 1 / k, "lr": 1e-4, "grad_norm": 2.0, "images_per_second": 9.5} if k else {}))
    return rows


class Elements(HTMLParser):
    """Elements of a page: [(name, attributes)], and its text."""

    def __init__(self, page):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def page_of(*runs, **options):
    return build_page("The title", list(runs), Options(**options))


@pytest.fixture
def whole(tmp_path):
    """A run that has everything."""
    rows = [{**row, "memory_gb": 1.25, "mse": 0.5} for row in gate_rows(12)] + [{"step": 40, "held_out_loss": 0.375}]
    facts = {"kept": [0, 2, 4, 6, 8, 10], "pattern": "1:2x6", "source": "teacher.pt", "profile": PROFILE}
    path = write_run(
        tmp_path / "whole", rows, (0, 20, 40), pruned_pt_json=facts, metrics_json={"fid": 3.25, "is": 80.0}
    )
    (path / "log.txt").write_text("[2026-01-02 03:04:05] begun\nwords\n[2026-01-02 04:00:00] the end of it\n")
    return path


def test_whole_run(whole):
    run = read_run(whole, lambda model: 12)
    page = page_of(run)
    elements = Elements(page)
    for text in ("held-out loss", "learning rate", "memory, GB", "images per second", "gradient norm", "mse"):
        assert text in elements.text
    assert len(elements.all("svg")) == 10  # seven curves; choices, probabilities and confidence of the gates
    assert len(elements.all("img")) == 3
    assert all(image["alt"] and image["src"].startswith("data:image/png;base64,") for image in elements.all("img"))
    for text in (
        "typed",
        "data/metadata.json",
        "3.25",
        "2,000",
        "1,000",
        "−50%",
        "One image on cpu, fp32.",
        "40 of 40",
        "the end of it",
        "mse",
    ):
        assert text in elements.text
    assert "2026-01-02 03:04:05 – 2026-01-02 04:00:00" in elements.text
    assert "--data-path 'a b'" in elements.text
    assert "Not measured" not in elements.text
    assert not re.search(r"\bNo (pictures|pruned|metrics|numbers|log)", elements.text)


def test_several_runs(whole, tmp_path):
    """Settings that differ are marked, curves are drawn into one chart, and missing parts are said by name."""
    other = write_run(tmp_path / "other", [{"step": 10, "loss": 2.0}, {"step": 40, "loss": 1.0}], settings={"lr": 2e-4})
    elements = Elements(page_of(read_run(whole), read_run(other)))
    assert len([line for line in elements.all("polyline") if re.search(r"\bs[01]\b", line["class"])]) >= 3
    assert "lr ≠" in elements.text
    assert "epochs ≠" not in elements.text
    assert "No pictures (samples/STEP.png) in other." in elements.text


def test_bare_run(tmp_path):
    """config.json alone makes a page that says what is not there."""
    text = Elements(page_of(read_run(write_run(tmp_path / "bare")))).text
    for part in ("pictures", "pruned weights with facts", "numbers over the steps", "facts about weights", "log.txt"):
        assert f"No {part}" in text
    assert "No metrics" in text
    assert "No gates were learned here." in text


@pytest.mark.parametrize("depth", [2, 12, 28, 100])
def test_any_depth(tmp_path, depth):
    run = read_run(write_run(tmp_path / "run", gate_rows(depth)))
    assert run.depth == depth
    svg = charts.draw_bars("bars", run.decisions[-1].probabilities, run.decisions[-1].kept)
    assert svg.count("<rect") == depth
    for drawn in (svg, charts.draw_decisions("map", run.decisions, depth)):
        root = ElementTree.fromstring(drawn)
        height = float(root.get("viewBox").split()[3])
        assert all(0 <= float(each.get("y")) <= height for each in root.iter("rect"))
        assert [child.tag for child in root][:2] == ["title", "desc"]


def test_decisions_without_probabilities(tmp_path):
    """Runs of before have kept layers and confidence only; the name of the model tells the depth."""
    rows = [{"step": k, "kept": [0, k % 3], "confidence": [0.5]} for k in range(4)]
    run = read_run(write_run(tmp_path / "run", rows), lambda model: 6)
    assert run.depth == 6
    page = page_of(run)
    assert "No probabilities of layers are recorded" in page
    assert "confidence of the gates" in page


def test_lines_that_are_no_rows(tmp_path):
    """A torn last line, text, lists, rows without a step, steps out of order, and layers that cannot be."""
    path = write_run(tmp_path / "run", [{"step": 3, "loss": 1.0}, {"step": 1, "loss": 3.0}])
    odd = ["[1]", "null", "text", '{"loss": 1}', '{"step": "x"}', '{"step": true}', '{"step": NaN}', "[" * 100_000]
    odd += ['{"step": 5, "kept": [1000000000], "keep_probability": ["a"], "confidence": {}}']
    odd += ['{"step": 6, "kept": 3, "keep_probability": [], "loss": [1]}', '{"step": 9, "lo']
    with open(path / "metrics.jsonl", "ab") as file:
        file.write("\n".join(odd).encode() + b"\xff\xfe")
    run = read_run(path)
    assert run.curves == {"loss": [(1.0, 3.0), (3.0, 1.0)]}
    assert run.depth == 0
    assert run.remarks == ["metrics.jsonl: 9 damaged line(s) passed over"]
    page_of(run)


@pytest.mark.parametrize(
    "values",
    [
        [math.nan, math.nan],
        [1.0, math.inf, 2.0],
        [0.0, 0.0],
        [5.0],
        [-1e308, 1e308],
        [1e-320, 2e-320],
        [-5.0, 3.0],
        [1e-9, 1e12],
        [1e15, 1e15 + 1],
        [10**400, 1.0],
        ["inf", "nan", "1.5"],
    ],
)
def test_odd_numbers(tmp_path, values):
    """Numbers that are not finite, enormous, tiny or all alike: what can be drawn lies in the chart."""
    rows = [{"step": k, "loss": value} for k, value in enumerate(values)]
    run = read_run(write_run(tmp_path / "run", rows))
    chart = charts.draw_lines("loss", [("run", "s0", run.curves["loss"])], log=True)
    for places in re.findall(r'points="([^"]+)"', chart or ""):
        for place in places.split():
            x, y = map(float, place.split(","))
            assert 0 <= x <= charts.WIDTH
            assert 0 <= y <= charts.HEIGHT
    page = page_of(run)
    odd = sum(not abs(number) < 1e300 for _, number in run.curves["loss"])
    assert (f"{odd} not finite" in page) == bool(odd)


def test_numbers_as_text():
    assert [show(value) for value in (1072032, 0.012345678, 1e-5, 123456.7, None, True, math.nan, math.inf, "nan")] == [
        *("1,072,032", "0.01235", "1e-5", "123,457", "–", "yes", "nan", "inf", "nan")
    ]
    assert [show_tick(value) for value in (0.25, 1e-5, 20000, 1500000, -3e9, 0)] == [
        *("0.25", "1e-5", "20k", "1.5M", "-3G", "0")
    ]
    assert show_change(200, 100) == "−50%"
    assert show_change(0, 1) == show_change(None, 1) == show_change(1, math.nan) == "–"
    assert as_number(10**400) is as_number(True) is as_number([1]) is as_number("ten") is None


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.1234, 0.1235), (-3, 1e6), (1e-5, 3e-5), (7, 7.0001)])
def test_ticks(low, high):
    ticks = charts.even_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    assert all(low - 1e-6 * (high - low) <= tick <= high + 1e-6 * (high - low) for tick in ticks)
    assert len({show_tick(tick) for tick in ticks}) == len(ticks)


@pytest.mark.parametrize(("low", "high"), [(1e-7, 1), (0.02, 0.9), (1, 30), (1e-300, 1e299)])
def test_log_ticks(low, high):
    assert 2 <= len(charts.log_ticks(low, high)) <= 6


def test_thinning():
    """Few points of many are drawn, and no peak is lost."""
    points = [(float(k), math.sin(k)) for k in range(100_003)]
    points[77_777] = (77_777.0, 50.0)
    thinned = thin(points)
    assert len(thinned) <= 500
    assert thinned == sorted(thinned)
    assert (thinned[0], thinned[-1]) == (points[0], points[-1])
    assert points[77_777] in thinned
    for count in range(490, 2100, 7):
        assert len(thin(points[:count])) <= 500
    assert thin(points[:500]) == points[:500]
    assert spread([1, 2, 3, 4, 5], 3) == [1, 3, 5]
    assert spread([1, 2, 3], 1) == [3]


def test_huge_metrics(tmp_path):
    rows = ({"step": k, "loss": 1 / (k + 1), "kept": [k % 2], "keep_probability": [0.5, 0.5]} for k in range(30_000))
    page = page_of(read_run(write_run(tmp_path / "run", list(rows))))
    assert len(page) < 100_000


def test_nothing_is_trusted(tmp_path):
    """Whatever stands in the files or in names of files is text in the page."""
    settings = {"prefix": EVIL, EVIL: 1, "model": EVIL, "save_model": "x\ud800"}
    rows = [{"step": 1, EVIL: 1.0, "loss": 1.0}]
    facts = {"source": EVIL, EVIL: [EVIL], "kept": EVIL, "pattern": EVIL, "profile": {"before": {"gmacs": EVIL}}}
    path = write_run(tmp_path / EVIL.replace("/", "_"), rows, settings=settings, pruned_pt_json=facts)
    (path / "log.txt").write_text(EVIL)
    config = json.loads((path / "config.json").read_text())
    config["origins"][EVIL] = config["origins"]["prefix"] = EVIL
    config["environment"] = {"command": EVIL, "device": EVIL, "commit": EVIL, "versions": {EVIL: EVIL}}
    config["sizes"] = {"parameters": {EVIL: EVIL}, "steps": EVIL, "images": EVIL}
    (path / "config.json").write_text(json.dumps(config))
    (path / "results.json").write_text(json.dumps({"fid": EVIL}))
    (path / "bad.json").write_text(EVIL)
    page = build_page(EVIL, [read_run(path)], Options(metrics={EVIL: {"fid": 1.0}}))
    elements = Elements(page)
    assert not elements.all("script")
    assert not elements.all("img")
    assert page.count("alert(1)") > 12
    known = {name for name, _ in Elements(page_of(read_run(write_run(tmp_path / "plain", gate_rows(2))))).found}
    assert {name for name, _ in elements.found} - known <= {"circle"}
    assert not [name for _, attributes in elements.found for name in attributes if name.startswith("on")]


def test_nothing_is_fetched(whole):
    """No address but data: and places in the page, in attributes and in the style."""
    elements = Elements(page_of(read_run(whole)))
    for _, attributes in elements.found:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    policy = next(each["content"] for each in elements.all("meta") if "http-equiv" in each)
    assert policy.startswith("default-src 'none'")
    assert "url(" not in page_of(read_run(whole))
    assert "@import" not in page_of(read_run(whole))


def test_page_is_sound(whole):
    """Elements are closed in order, places are unique, tables have headers, charts say what they are."""
    page = page_of(read_run(whole))
    source = re.sub(r"<(meta|link|img)\b([^>]*)>", r"<\1\2/>", page.partition("\n")[2])
    root = ElementTree.fromstring(source)
    anchors = [each.get("id") for each in root.iter() if each.get("id")]
    assert len(set(anchors)) == len(anchors)
    assert {link.get("href") for link in root.iter("a")} == {f"#{anchor}" for anchor in anchors}
    for each in root.iter("table"):
        assert each.find("caption") is not None
        assert {cell.get("scope") for cell in each.iter("th")} == {"col", "row"}
    for each in root.iter("svg"):
        assert each.get("role") == "img"
        assert each.find("title").text
        assert each.find("desc").text


def test_elements():
    assert element("p", "a < b", None, Markup("<b>c</b>"), class_="x y", hidden=True, id=None) == (
        '<p class="x y" hidden>a &lt; b<b>c</b></p>'
    )
    assert element("img", alt='"') == '<img alt="&quot;">'


def test_pictures(tmp_path):
    path = tmp_path / "0.png"
    path.write_bytes(picture(300, 20))
    shown = embed_picture(path, "words")
    assert 'width="300" height="20"' in shown
    assert base64.b64decode(re.search(r"base64,([^\"]+)", shown)[1]) == path.read_bytes()
    for damaged in (picture()[:-5], b"", b"GIF89a", b"\x89PNG\r\n\x1a\n"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="no PNG, or not whole"):
            embed_picture(path, "words")
    with pytest.raises(ValueError, match="cannot be read"):
        embed_picture(tmp_path / "none.png", "words")


def test_many_and_damaged_pictures(tmp_path):
    path = write_run(tmp_path / "run", samples=range(0, 3000, 100))
    (path / "samples" / "note.png").write_bytes(b"no step")
    (path / "samples" / "0000000.png").write_bytes(picture()[:-3])
    elements = Elements(page_of(read_run(path), samples=4))
    assert len(elements.all("img")) == 3
    assert "4 of 30 pictures are shown." in elements.text
    assert "0000000.png: is no PNG, or not whole" in elements.text
    assert "step 2,900" in elements.text


def test_sizes(tmp_path):
    """Of the newest state, of the pruned weights, and where profiles are missing or null."""
    kept = {"kept": [0, 1, 3], "pattern": "1:2,2:4"}
    path = write_run(tmp_path / "a", checkpoints__0000009_pt_json={"kept": [7]}, checkpoints__0000010_pt_json=kept)
    assert find_sizes(read_run(path)) == ({"layers": 6}, {"layers": 3})
    path = write_run(tmp_path / "b", pruned_pt_json={"profile": {"before": None, "after": {"gmacs": 1}}})
    assert find_sizes(read_run(path)) == ({}, {"gmacs": 1})
    path = write_run(tmp_path / "c", settings={"save_model": str(tmp_path / "d.pt")})
    (tmp_path / "d.pt.json").write_text(json.dumps({**kept, "profile": PROFILE}))
    before, after = find_sizes(read_run(path))
    assert before == {"layers": 6, **PROFILE["before"]}
    assert after == {"layers": 3, **PROFILE["after"]}
    assert count_pattern("2:4x3,1:2") == 14
    assert count_pattern("a") is count_pattern(None) is count_pattern("1:2,") is count_pattern("") is None


def test_folders_called_alike(tmp_path):
    runs = [read_run(write_run(tmp_path / part / "run")) for part in "ab"] + [read_run(write_run(tmp_path / "c"))]
    name_apart(runs)
    assert [run.name for run in runs] == [str(tmp_path / "a/run"), str(tmp_path / "b/run"), "c"]


def test_more_runs_than_colours(tmp_path):
    runs = [read_run(write_run(tmp_path / f"{k}", [{"step": 1, "loss": k}])) for k in range(20)]
    assert len({charts.series_class(k) for k in range(20)}) == 20
    assert "dash2" in page_of(*runs)


def test_curves_are_known_by_name():
    """A name that the trainer's rows have is never taken for a term of the loss."""
    known = {name for name, *_ in figures.CURVES}
    assert {"lr", "grad_norm", "images_per_second", "memory_gb", "held_out_loss", "tau", "scaling"} <= known


def run_script(*words):
    report_runs.main(report_runs.parse_args(list(map(str, words))))


def test_script(whole, tmp_path, capsys):
    """The page is written whole, with the layers that the model's name tells, and further metrics."""
    numbers = tmp_path / "more.json"
    numbers.write_text(json.dumps({"fid": 7.125}))
    run_script(whole, "--metrics", numbers, "--output", tmp_path / "r.html", "--title", "Its <title>")
    text = (tmp_path / "r.html").read_text()
    assert "<h1>Its &lt;title&gt;</h1>" in text
    assert "7.125" in text
    assert read_run(whole, report_runs.count_layers).layers == 12
    assert report_runs.count_layers("no model") is None
    assert re.fullmatch(r"wrote \S+r\.html: 1 run\(s\), \S+ MB\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{tmp}/none", "RUN .*none: is not there; name a folder that a training or pruning run has written"),
        ("{tmp}", "RUN .*: has no config.json"),
        ("{tmp}/file", "RUN .*file: is no folder"),
        ("{tmp}/other", "RUN .*other: its config.json holds no settings of a run"),
        ("{tmp}/broken", r"RUN .*broken: .*config.json: cannot be read as JSON"),
        ("{run} {tmp}/none", "RUN .*none: is not there"),
        ("{run} --metrics {tmp}/none", "--metrics .*none: cannot be read as JSON"),
        ("{run} --metrics {run}/config.json", "--metrics .*: holds no fid"),
        ("{run} --output {run}/metrics.jsonl", "--output .*: expected a name that ends with .html"),
        ("{run} --output {tmp}/file/x.html", "--output"),
        ("{run} --output {tmp}/a.html", "--output .*a.html: is a folder"),
    ],
)
def test_wrong_input(whole, tmp_path, words, message):
    """What cannot be used is named with its flag, and nothing is written."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "a.html").mkdir()
    for name, text in (("other", '{"model_type": "x"}'), ("broken", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message):
        run_script(*words.format(tmp=tmp_path, run=whole).split())
    assert sorted(tmp_path.rglob("*")) == before


def test_folder_of_an_earlier_version(tmp_path):
    """Its config.json held the settings alone."""
    (tmp_path / "config.json").write_text(json.dumps({"model": "DiT-T/2", "lr": 0.125}))
    (tmp_path / "log.txt").write_text("words")
    run = read_run(tmp_path)
    assert run.settings["lr"] == 0.125
    assert "0.125" in page_of(run)


@pytest.mark.parametrize(("depth", "steps"), [(4, 3), (12, 15), (28, 300), (60, 2)])
def test_plot_of_decisions(tmp_path, depth, steps):
    """The walkthrough's plot takes depth and groups from the run; its height grows with the layers."""
    settings = {"model": f"DiT-T-D{depth}/2", "pattern": "1:2", "candidates": "all"}
    path = write_run(tmp_path / "run", gate_rows(depth, steps), settings=settings)
    pictures.draw_decisions(path, tmp_path / "d.png")
    assert sum(m for _, m in pictures.read_groups(path)) == depth
    height = struct.unpack(">II", (tmp_path / "d.png").read_bytes()[16:24])[1]
    assert height == pytest.approx(110 * (1.5 + 0.16 * depth), abs=2)


def test_candidates_of_groups(tmp_path):
    """How unsure a group can be depends on the choices that it has."""
    for candidates, count in (("all", 3432), ("contiguous", 8), ("layers", 3432)):
        settings = {"model": "DiT-T-D28/2", "pattern": "7:14", "candidates": candidates}
        path = write_run(tmp_path / candidates, settings=settings)
        assert pictures.count_candidates(path) == [count, count]


def test_rows_of_a_plot():
    assert pictures.thin(list(range(1000)), 3) == [0, 334, 668, 999]
    assert pictures.thin([1, 2]) == [1, 2]
    assert pictures.thin([]) == []


def test_page_of_the_walkthrough(tmp_path, root):
    """It shows the table and the samples, then the runs."""
    spec = importlib.util.spec_from_file_location("walkthrough", root / "examples/digits/report.py")
    walkthrough = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(walkthrough)
    for name in ("teacher-DiT-T-4", "learn_mask-DiT-T-4"):
        write_run(tmp_path / "outputs" / name, gate_rows(12))
    (tmp_path / "samples.png").write_bytes(picture(1320, 300))
    values = ("learned", 6, 1072032, 9.5, 81.25, 119.5, 0.995, [0, 3, 5, 6, 9, 10])
    walkthrough.write_runs(tmp_path, [dict(zip(walkthrough.COLUMNS, values, strict=True))], "DiT")
    elements = Elements((tmp_path / "report.html").read_text())
    for text in (*walkthrough.COLUMNS, "1,072,032", "99.5%", "teacher-DiT-T-4", "learn_mask-DiT-T-4"):
        assert text in elements.text
    assert len(elements.all("img")) == 1
    table = walkthrough.format_table([dict(zip(walkthrough.COLUMNS, values, strict=True))])
    assert table.splitlines()[2] == "| learned | 6 | 1,072,032 | 9.5 | 81.25 | 119.5 | 99.5% | [0, 3, 5, 6, 9, 10] |"
