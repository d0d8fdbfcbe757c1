"""The studio's page in a real browser, as a person uses it: Chromium, driven by Playwright with pointer events.

Needs Debian's chromium; continuous integration installs and requires it.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

import rewrite_core as rc
from rewrite_core.benchmarks.bench_studio import Hand

CHROMIUM = shutil.which("chromium")
REQUIRED = os.environ.get("CI") == "true"
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
PATIENCE = 150_000  # milliseconds, on a busy machine


class Server:
    """`rewrite studio` on the embedded generator, in a folder of its own."""

    def __init__(self, folder, count=400):
        self.folder, self.count = folder, count
        self.start()

    def start(self, port=0):
        command = [sys.executable, "-m", "rewrite_core", "studio", "--no-browser", "--port", str(port)]
        options = ["--count", str(self.count), "--quiet"]
        self.process = subprocess.Popen(
            [*command, *options], cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.address = self.process.stdout.readline().strip()
        assert self.address.startswith("http://127.0.0.1:"), self.process.stderr.read()
        self.port = int(self.address.split(":")[2].split("/")[0])

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("studio"))
    yield server
    server.kill()


@pytest.fixture(scope="session")
def browser_is_there():
    """Where Chromium is; a test that needs it is skipped where it, or playwright, is missing, but for CI."""
    if not REQUIRED:
        pytest.importorskip("playwright", reason="the page's tests need playwright")
        if CHROMIUM is None:
            pytest.skip("the page's tests need Debian's chromium")
    assert CHROMIUM is not None, "continuous integration installs chromium"
    return CHROMIUM


@pytest.fixture(scope="module")
def browser(browser_is_there):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_is_there, args=FLAGS)
        yield browser
        browser.close()


class Page(Hand):
    """The page as a person uses it."""

    def __init__(self, browser, server):
        self.context = browser.new_context(viewport={"width": 1280, "height": 720})
        self.page, self.server, self.errors = self.context.new_page(), server, []
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.open()

    def open(self):
        self.page.goto(self.server.address)
        self.page.wait_for_selector("body[data-ready]", timeout=PATIENCE)

    def choose(self, row):
        self.page.fill("#goto", str(row))
        self.page.press("#goto", "Enter")
        self.wait(lambda: self.page.get_attribute("body", "data-row") == str(row))

    def around(self, mask):
        self.page.click("[data-tool=lasso]")
        super().around(mask)

    def use(self, slot):
        count = self.page.locator(f"[data-slot={slot}] .card").count()
        self.page.click(f"#use-{slot}")
        self.wait(
            lambda: self.page.locator(f"[data-slot={slot}] .card").count() == (1 if slot == "copy" else count + 1)
        )

    def wait(self, until):
        end = time.monotonic() + PATIENCE / 1000
        while not until():
            told = self.page.inner_text("#toasts") if time.monotonic() > end else ""
            assert time.monotonic() < end, f"the page did not get there: {told} {self.errors}"
            self.page.wait_for_timeout(50)

    def settle(self):
        """Until the gallery has followed the change."""
        self.wait(lambda: self.page.locator("body[data-busy]").count() == 0 and self.state()["live"] is not None)

    def tile(self, row):
        """The pixels of a picture in the gallery."""
        return self.page.evaluate(
            """(row) => { const c = document.querySelector(`.tile[data-row='${row}'] canvas`);
                return [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data].join(); }""",
            row,
        )

    def names(self):
        """Of the rules, as the page shows them."""
        return self.page.locator("#rules input[type=text]").evaluate_all("each => each.map((one) => one.value)")

    def open_how(self):
        """The settings are there to be changed."""
        if self.page.locator("#how").get_attribute("open") is None:
            self.page.focus("#how summary")
            self.page.keyboard.press("Enter")
        self.wait(lambda: self.page.locator("#rank").is_visible())

    def choose_layer(self, name):
        """Another layer, by keyboard; its second moment is collected where it is not there."""
        self.page.focus("#layer-strip summary")
        self.page.keyboard.press("Enter")
        button = self.page.locator("#layers button", has_text=name)
        self.wait(lambda: button.count() == 1)
        button.focus()
        self.page.keyboard.press("Enter")
        self.wait(lambda: self.state()["layer"] == name)
        self.wait(lambda: self.page.inner_text("#layer-name").startswith(name))

    def drop(self, file):
        """A file is dropped onto the page."""
        data = self.page.evaluate_handle(
            """([name, text]) => { const bytes = Uint8Array.from(atob(text), (each) => each.charCodeAt(0));
                const data = new DataTransfer(); data.items.add(new File([bytes], name)); return data; }""",
            [file.name, base64.b64encode(file.read_bytes()).decode()],
        )
        self.page.dispatch_event("main", "drop", {"dataTransfer": data})

    def edit_of_others(self):
        square = [rc.Selection.box(row, (8, 8, 40, 40), (64, 64)) for row in range(3)]
        return rc.Edit(copy=square[0], paste=square[1], context=[square[2]])

    def edit(self):
        return rc.Edit.from_json(self.page.request.get(self.address("/api/edit.json")).text())

    def state(self):
        return self.page.request.get(self.address("/api/state")).json()

    def late(self, path, seconds):
        """The page gets its answers from there so much later; the server is asked at once."""

        def answer(route):
            found = route.fetch()
            time.sleep(seconds)
            route.fulfill(response=found)

        self.page.route(f"**{path}", answer)

    def address(self, path):
        return f"http://127.0.0.1:{self.server.port}{path}"

    def close(self):
        """The page goes; it has said no error but that it was answered with a refusal, as every page that waits is."""
        self.context.close()
        assert not [error for error in self.errors if "Failed to load resource" not in error]

    def clear(self):
        """An empty bench."""
        for rule in self.state()["rules"]:
            assert self.page.request.delete(self.address(f"/api/rules/{rule['number']}")).ok
        assert self.page.request.put(self.address("/api/edit"), data="{}").ok
        assert self.page.request.delete(self.address("/api/fit")).ok
        settings = {
            "rank": 4,
            "loss": "l2",
            "region": "map",
            "preserve": 0,
            "strength": 1,
            "objective": "value",
            "units": 30,
        }
        assert self.page.request.put(self.address("/api/settings"), data=json.dumps(settings)).ok
        self.open()


@pytest.fixture
def page(browser, server):
    page = Page(browser, server)
    page.clear()
    yield page
    page.close()
