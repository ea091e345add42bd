"""The report in a browser: real runs side by side, at the width of a phone and of a desk."""

import importlib.util
import json
import shutil

import pytest
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
LACKING = [
    *([] if CHROMIUM and DRIVER else ["no Chromium here: install chromium and chromium-driver"]),
    *([] if importlib.util.find_spec("selenium") else ["no selenium here: install requirements-dev.txt"]),
]
pytestmark = pytest.mark.skipif(bool(LACKING), reason="; ".join(LACKING))

QUIET = (  # nothing is to be asked of a network by the browser itself
    "--headless=new --no-sandbox --disable-gpu --disable-background-networking --no-first-run "
    "--disable-component-update --disable-sync --disable-default-apps --hide-scrollbars"
)
TRAIN = ["--epochs", "2", "--global-batch-size", "16", "--num-workers", "0", "--log-every", "1"]
EVIL = "<img src=https://evil.example/x onerror=alert(1)>"


@pytest.fixture(scope="module")
def page(teacher, latents, tmp_path_factory, run_script):
    """The report of two runs of gate learning and one of training, with pictures, sizes and metrics."""
    results = tmp_path_factory.mktemp("report")
    words = ["--load-weight", teacher.weights, "--data-path", latents, "--results-dir", results, *TRAIN]
    learn = ["prune_by_learning", "--model", teacher.model, *words]
    run_script(*learn, "--pattern", "1:2", "--prefix", "first")
    run_script(*learn, "--pattern", "2:4,1:2,3:4,1:2", "--prefix", EVIL.replace("/", "_"))
    runs = sorted(results.iterdir())
    for run in runs:
        add_findings(run)
    run_script("report_runs", *runs, teacher.folder, "--output", results / "report.html", "--title", EVIL)
    return results / "report.html"


def add_findings(run):
    """What a run leaves beside its numbers: pictures along the way, sizes, and the evaluator's metrics."""
    (run / "samples").mkdir(exist_ok=True)
    for k in range(3):
        Image.new("RGB", (64, 32), (80 * k, 90, 120)).save(run / "samples" / f"{4 * k:07d}.png")
    facts = json.loads((run / "pruned.pt.json").read_text())
    sizes = {"parameters": 2_000_000, "gmacs": 1.5, "latency_ms": 20.0, "memory_gb": None}
    facts["profile"] = {"before": sizes, "after": {"parameters": 1_000_000, "gmacs": 0.75}}
    (run / "pruned.pt.json").write_text(json.dumps(facts))
    (run / "metrics.json").write_text(json.dumps({"fid": 12.5, "sfid": float("nan"), "samples": 500}))


@pytest.fixture
def browse(tmp_path):
    """browse(page, width) opens a page in a browser of its own; it is closed afterwards."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    opened = []

    def browse(page, width, scheme="light"):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for word in (*QUIET.split(), f"--user-data-dir={tmp_path / f'profile{len(opened)}'}"):
            options.add_argument(word)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        opened.append(driver)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        driver.get("about:blank")  # leaves the browser's own start page
        driver.get_log("performance")
        driver.get(page.as_uri())
        return driver

    yield browse
    for driver in opened:
        driver.quit()


def requested(driver):
    """Addresses that the browser asked for, but those that are in the page."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    return {address for address in asked if not address.startswith("data:")}


@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(page, browse, width):
    driver = browse(page, width)
    driver.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")
    assert driver.execute_script("return document.documentElement.clientWidth") == width
    sizes = driver.execute_script("return [...document.images].map(each => [each.complete, each.naturalWidth])")
    assert sizes == [[True, 64]] * 6
    assert requested(driver) == {page.as_uri()}
    assert driver.get_log("browser") == []
    wide = "return [document.documentElement.scrollWidth, document.body.scrollWidth]"
    assert max(driver.execute_script(wide)) <= width
    boxes = driver.execute_script(
        "return [...document.querySelectorAll('svg.chart')].map(each => each.getBoundingClientRect())"
        ".map(box => [box.left, box.right, box.height])"
    )
    assert len(boxes) > 8
    assert all(left >= 0 and right <= width and height > 50 for left, right, height in boxes)


def test_letters_can_be_read(page, browse):
    """On a phone, letters of charts are at least 9 pixels high, and no text of a chart leaves it."""
    driver = browse(page, 390)
    found = driver.execute_script(
        "return [...document.querySelectorAll('svg.chart text')].map(each => {"
        "const box = each.getBoundingClientRect(), chart = each.ownerSVGElement.getBoundingClientRect();"
        "return [box.height, box.left >= chart.left - 1 && box.right <= chart.right + 1]})"
    )
    assert found
    assert min(height for height, _ in found) >= 9
    assert all(inside for _, inside in found)


def luminance(colour):
    """Relative luminance of rgb(r, g, b), as WCAG defines it."""
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(page, browse, scheme):
    """Text, notes and curves stand out from what is behind them."""
    driver = browse(page, 1280, scheme)
    style = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    back, paper = (driver.execute_script(style, part, "backgroundColor") for part in ("body", ".card"))
    assert (luminance(back) > 0.5) == (scheme == "light")
    for part, kind, behind, least in (
        ("body", "color", back, 7),
        (".note", "color", back, 4.5),
        ("nav a", "color", back, 4.5),
        (".chart text", "fill", paper, 4.5),
        (".line.s0", "stroke", paper, 3),
        (".line.s1", "stroke", paper, 3),
    ):
        light, dark = sorted((luminance(driver.execute_script(style, part, kind)), luminance(behind)))[::-1]
        assert (light + 0.05) / (dark + 0.05) >= least, part
