"""report.html: its numbers, and how it behaves in a real browser, where there is one: headless Chromium, spoken
to over a pipe."""

import base64
import contextlib
import csv
import fcntl
import io
import json
import os
import shutil
import re
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import report

chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
flags = """
    --headless --no-sandbox --disable-background-networking --disable-component-update --disable-default-apps
    --disable-extensions --disable-sync --no-first-run --mute-audio --hide-scrollbars --disable-dev-shm-usage
    --use-angle=swiftshader --enable-unsafe-swiftshader --ignore-gpu-blocklist --remote-debugging-pipe
""".split()


class Page:
    """One page of a browser: commands of the DevTools protocol, and the events that came meanwhile."""

    def __init__(self, to_browser, from_browser):
        self.to_browser, self.from_browser, self.parts = to_browser, from_browser, [b""]
        self.number, self.session, self.events = 0, {}, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def receive(self):
        while b"\0" not in self.parts[-1]:
            self.parts.append(os.read(self.from_browser, 1 << 20))  # messages quote pictures, megabytes long
            assert self.parts[-1], "the browser ended"
        last, _, rest = self.parts[-1].partition(b"\0")
        message, self.parts = b"".join([*self.parts[:-1], last]), [rest]
        return json.loads(message)

    def call(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters, **self.session}
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while True:
            found = self.receive()
            if found.get("id") == self.number:
                assert "error" not in found, found
                return found["result"]
            self.events.append(found)

    def evaluate(self, expression):
        """The value of a JavaScript expression, awaited."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, expression):
        """Wait until a JavaScript expression is true; a minute is more than the slowest machine needs."""
        waiting = f"""new Promise((resolve, reject) => {{
            const start = Date.now(), look = () => ({expression}) ? resolve(true)
                : Date.now() - start > 60000 ? reject("not in a minute: " + {json.dumps(expression)})
                : setTimeout(look, 50);
            look(); }})"""
        return self.evaluate(waiting)

    def screenshot(self, **options):
        """(height, width, 3) uint8"""
        data = self.call("Page.captureScreenshot", format="png", **options)["data"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))

    def of_element(self, selector):
        """Screenshot of an element, scrolled to."""
        box = self.evaluate(f"""(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView();
            const b = e.getBoundingClientRect();
            return [b.x + scrollX, b.y + scrollY, b.width, b.height]; }})()""")
        clip = dict(zip(("x", "y", "width", "height"), box), scale=1)
        return self.screenshot(clip=clip, captureBeyondViewport=True)

    def resize(self, width, height=900):
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        self.call("Emulation.setDeviceMetricsOverride", **size)


@contextlib.contextmanager
def opened(path, folder):
    """path in a browser of its own, whose profile lies in folder."""
    (read_end, to_browser), (from_browser, write_end) = os.pipe(), os.pipe()
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (read_end, write_end)]  # above those that they become

    def connect():  # the browser reads from 3 and writes to 4
        os.dup2(ends[0], 3)
        os.dup2(ends[1], 4)

    process = subprocess.Popen(
        [chromium, *flags, f"--user-data-dir={folder}"],
        preexec_fn=connect, pass_fds=(3, 4), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    for end in (read_end, write_end, *ends):
        os.close(end)
    try:
        page = Page(to_browser, from_browser)
        page.resize(1280)
        page.call("Page.navigate", url=path.resolve().as_uri())
        page.until("document.readyState === 'complete'")
        yield page
    finally:
        os.close(to_browser)  # ends it
        os.close(from_browser)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def complaints(page):
    """Script errors and what the page asked of the network."""
    found = []
    for event in page.events:
        what, about = event["method"], event.get("params", {})
        if what == "Runtime.exceptionThrown" or (what == "Runtime.consoleAPICalled" and about["type"] == "error"):
            found.append(about)
        if what == "Log.entryAdded" and about["entry"]["level"] == "error":
            found.append(about)
        if what == "Network.requestWillBeSent":
            url = about["request"]["url"]
            found += [url] * (not url.startswith(("file:", "data:", "blob:", "about:")))
    return found


# ---- what stands in it --------------------------------------------------------------------------


class Parsed(HTMLParser):
    """Tables as lists of rows of texts, the page's whole text, addresses that it loads, and the surface's maps."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.text, self.sources, self.inside, self.maps, self.is_cell = [], [], [], "", "", False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.inside = attributes.get("id") or tag
        self.sources += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.is_cell = True

    def handle_endtag(self, tag):
        self.is_cell &= tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside == "surface-maps":
            self.maps += data
        self.text.append(data)
        if self.is_cell:
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def parsed(evaluation):
    return Parsed((evaluation.folder / "report.html").read_text())


def show(number, digits=4):
    return "–" if number is None else f"{number:.{digits}f}"


def test_numbers_of_the_report(evaluation, parsed):
    content = json.loads((evaluation.folder / "scores.json").read_text())
    found = content["scores"]

    def cell(metrics, metric, value):
        ends = metrics[metric][f"{value}_95"]
        return show(metrics[metric][value]) + (f" {ends[0]:.4f} to {ends[1]:.4f}" if ends else "")

    split, counts = "organisers' held-out pictures", content["n_images"] | {"all": sum(content["n_images"].values())}
    wanted = {}
    for prediction, subjects in found.items():
        for subject, metrics in subjects.items():
            cells = [cell(metrics, *what) for what in (("r2", "median"), ("r2", "mean"), ("r", "median"))]
            row = [split, prediction, subject, str(counts[subject]), *cells, cell(metrics, "challenge", "mean")]
            wanted.setdefault(subject == "all", []).append(row)
    headlines, of_subjects, rois = (table[1:] for table in parsed.tables)
    assert headlines[: len(wanted[True])] == wanted[True] and of_subjects == wanted[False]
    assert len(of_subjects) == 16
    rest = [row[:1] + row[4:] for row in headlines[len(wanted[True]) :]]
    assert rest[:2] == [  # the report's Table: phase 1, phase 2
        ["report, phase 1", "0.2040", "–", "–", "0.589"], ["report, phase 2", "0.2087", "–", "–", "0.602"],
    ]  # fmt: skip
    with np.load(evaluation.folder / "vertices.npz") as vertices:
        ceiling = vertices["noise_ceiling"]
    known = ceiling[~np.isnan(ceiling)]
    assert rest[2] == ["noise ceiling of R²", show(np.median(known)), show(np.mean(known)), "–", "–"] and len(rest) == 3
    number = cell(found["subject"]["all"], "r2", "median")
    text = "".join(parsed.text)
    assert f"The number to report: median R² {number}, challenge score" in text and "5 to 12 pictures a subject" in text
    assert "Validation chose the checkpoint" not in text  # these pictures did not
    for part in (content["scored"]["data_fingerprint"], content["versions"]["torch"], "RESAMPLES", "WEIGHT_DECAY"):
        assert part in text

    rows = {}
    for row in csv.DictReader((evaluation.folder / "scores.csv").open()):
        rows[tuple(row[k] for k in ("subject", "roi_group", "roi", "prediction", "metric", "hemisphere"))] = row
    places = {key[:3] for key in rows}
    assert {tuple(row[:3]) for row in rois} == places and len(rois) == len(places)
    what = [("subject", "r2", "both"), ("subject", "r2", "lh"), ("subject", "r2", "rh"), ("subject", "r", "both")]
    what += [("subject", "challenge", "both"), ("group", "r2", "both")]
    for row in rois:
        of = [rows[*row[:3], *which] for which in what]
        values = [part["mean" if which[1] == "challenge" else "median"] for part, which in zip(of, what)]
        assert row[3] == of[0]["n_vertices"]
        for text, value in zip(row[4:], values, strict=True):
            assert text == "–" if value == "" else abs(float(text) - float(value)) < 0.00051


def test_the_report_needs_no_other_file(evaluation, parsed):
    assert (evaluation.folder / "report.html").stat().st_size < 15e6
    assert len([source for source in parsed.sources if source.startswith("data:image/png;base64,")]) == 6
    assert all(source.startswith("data:") for source in parsed.sources)


def test_colours_on_the_cortex(evaluation, parsed):
    """Every vertex of fsaverage5, the first of fsaverage, has the colour of its R²; the others are grey."""
    content = json.loads(parsed.maps)
    with np.load(evaluation.folder / "vertices.npz") as found:
        own, place, left = found["subject_r2"], found["fsaverage_index"], found["hemisphere"] == "lh"
        names, group = list(found["subjects"]), found["group_r2"]
    wanted = {"median of the subjects": np.nanmedian(own, 0), "group prediction": np.nanmedian(group, 0)}
    wanted |= dict(zip(names, own))
    assert list(content["maps"]) == list(wanted) and len(content["palette"]) == 256
    top = float(re.search(r"colours end at ([\d.]*\d)", "".join(parsed.text))[1])
    for name, values in wanted.items():
        codes = np.frombuffer(base64.b64decode(content["maps"][name]), np.uint8)
        assert codes.shape == (2 * 10242,)
        scored = np.zeros(len(codes), bool)
        for vertex, is_left, value in zip(place, left, values):
            if vertex < 10242 and value == value:
                code = codes[vertex + (0 if is_left else 10242)]
                assert abs(code - (2 + 253 * np.clip(value / top, 0, 1))) <= 0.51
                scored[vertex + (0 if is_left else 10242)] = True
        assert scored.sum() > 100 and (codes[~scored] < 2).all()


# ---- in a browser -------------------------------------------------------------------------------


@pytest.mark.skipif(chromium is None, reason="no chromium here")
def test_in_a_browser(evaluation, tmp_path):
    with opened(evaluation.folder / "report.html", tmp_path / "profile") as page:
        page.until("document.getElementById('cortex').dataset.shows === 'median of the subjects'")
        shown, name = [], "median of the subjects"
        for name in (name, name, "subj03"):
            page.evaluate(f"""(() => {{ const choice = document.getElementById("of-map");
                choice.value = "{name}"; choice.dispatchEvent(new Event("change")); }})()""")
            page.until(f"document.getElementById('cortex').dataset.shows === '{name}'")
            page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
            shown.append(page.of_element("#cortex")[80:, :700].astype(int))  # without buttons and colour bar
        for picture in shown:
            is_grey, value = np.ptp(picture, axis=2) < 12, picture.max(2)
            assert (is_grey & (value > 120) & (value < 215)).mean() > 0.1  # a cortex
            assert (~is_grey | (value < 60)).sum() > 500  # and colours on it
        changed = [(np.abs(a - b).max(2) > 30).sum() for a, b in zip(shown, shown[1:])]
        assert changed[0] < 50 and changed[1] > 500

        for width in (1280, 390):
            page.resize(width)
            page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
            assert page.evaluate("innerWidth") == width
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            pictures = "[...document.images].map(image => [image.naturalWidth, image.getBoundingClientRect().right])"
            for natural_width, right in page.evaluate(pictures):
                assert 500 < natural_width <= report.widest and right <= width
            beyond = "(table => table.scrollWidth - table.parentNode.clientWidth)(document.getElementById('{}'))"
            for table in ("headlines", "subjects"):  # on a phone they scroll
                assert width < 500 or page.evaluate(beyond.format(table)) <= 0

        column = """[...document.querySelectorAll("#rois tbody tr")].filter(row => !row.hidden)
            .map(row => [row.cells[0].textContent, row.cells[4].textContent])"""
        click = "document.querySelectorAll('#rois th')[4].click()"
        rows = page.evaluate(column)
        assert {name for name, _ in rows} == {"all"} and len(rows) > 20
        for direction in (1, -1):
            page.evaluate(click)
            numbers = [float(text) * direction for _, text in page.evaluate(column) if text != "–"]
            assert numbers == sorted(numbers) and len(set(numbers)) > 10
        page.evaluate("""(() => { const choice = document.getElementById("of-subject");
            choice.value = "subj05"; choice.dispatchEvent(new Event("change")); })()""")
        assert {name for name, _ in page.evaluate(column)} == {"subj05"}
        assert complaints(page) == []
