"""report.html in a real browser, where there is one: headless Chromium, spoken to over a pipe."""

import base64
import contextlib
import io
import json
import os
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

import evaluate
from conftest import run

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
    read_end, to_browser = os.pipe()
    from_browser, write_end = os.pipe()
    # the browser reads from 3 and writes to 4, whatever numbers the pipes have here
    shell = ["sh", "-c", f'exec "$@" 3<&{read_end} 4>&{write_end}', "sh", chromium, *flags, f"--user-data-dir={folder}"]
    quiet = dict(stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    process = subprocess.Popen(shell, pass_fds=(read_end, write_end), **quiet)
    os.close(read_end)
    os.close(write_end)
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
