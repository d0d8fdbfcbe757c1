"""The studio's page in a real browser: drawn on with pointer events, and the saved mask looked at to the pixel.

Needs Debian's chromium; continuous integration installs and requires it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch

import rewrite_core as rc
from rewrite_core.demo import load_edit

CHROMIUM = shutil.which("chromium")
REQUIRED = os.environ.get("CI") == "true"
if not REQUIRED:
    pytest.importorskip("playwright", reason="the page's tests need playwright")
    if CHROMIUM is None:
        pytest.skip("the page's tests need Debian's chromium", allow_module_level=True)
from playwright.sync_api import sync_playwright  # noqa: E402

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
PATIENCE = 60_000  # milliseconds, on a busy machine


class Server:
    """`rewrite studio` on the embedded generator, in a folder of its own."""

    def __init__(self, folder):
        self.folder = folder
        self.start()

    def start(self, port=0):
        command = [sys.executable, "-m", "rewrite_core", "studio", "--no-browser", "--port", str(port)]
        options = ["--count", "400", "--quiet"]
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


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Page:
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

    def place(self, x, y):
        """Where a place of the picture, 0..1 across and down, is on the screen."""
        box = self.page.locator("#canvas").bounding_box()
        side = min(box["width"], box["height"])
        return box["x"] + (box["width"] - side) / 2 + x * side, box["y"] + (box["height"] - side) / 2 + y * side

    def lasso(self, mask):
        """Around the mask's rectangle, by mouse."""
        self.page.click("[data-tool=lasso]")
        left, top, right, bottom = bounds(mask)
        corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
        self.page.mouse.move(*self.place(*corners[0]))
        self.page.mouse.down()
        for corner in corners[1:]:
            self.page.mouse.move(*self.place(*corner), steps=3)
        self.page.mouse.up()

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

    def edit(self):
        return rc.Edit.from_json(self.page.request.get(self.address("/api/edit.json")).text())

    def state(self):
        return self.page.request.get(self.address("/api/state")).json()

    def address(self, path):
        return f"http://127.0.0.1:{self.server.port}{path}"

    def clear(self):
        """An empty bench."""
        for path, body in (("/api/edit", "{}"), ("/api/rules", "[]")):
            assert self.page.request.put(self.address(path), data=body).ok
        assert self.page.request.delete(self.address("/api/fit")).ok
        settings = {"rank": 4, "loss": "l2", "region": "map", "preserve": 0, "strength": 1, "objective": "value"}
        assert self.page.request.put(self.address("/api/settings"), data=json.dumps(settings)).ok
        self.open()


def bounds(mask):
    """Left, top, right, bottom of what a mask marks, 0..1."""
    rows, columns = np.nonzero(mask > 0.5)
    height, width = mask.shape
    return columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height


@pytest.fixture
def page(browser, server):
    page = Page(browser, server)
    page.clear()
    yield page
    refused = [error for error in page.errors if "Failed to load resource" not in error]
    page.context.close()
    assert not refused


def test_a_rectangle_is_saved_to_the_pixel(page):
    page.choose(7)
    page.page.click("[data-tool=box]")
    page.page.mouse.move(*page.place(0.25, 0.125))
    page.page.mouse.down()
    page.page.mouse.move(*page.place(0.5, 0.6), steps=2)
    page.page.mouse.move(*page.place(0.75, 0.5), steps=2)
    page.page.mouse.up()
    page.use("copy")
    page.wait(lambda: page.edit().copy is not None if page.state()["edit"] else False)
    selection = page.edit().copy
    assert selection.index == 7 and selection.mask.shape == (256, 256)
    found = bounds(selection.mask)
    assert np.abs(np.array(found) - (0.25, 0.125, 0.75, 0.5)).max() <= 1.01 / 256
    assert set(np.unique(selection.mask)) == {0.0, 1.0}


def test_tools_take_away_undo_and_redo(page):
    page.choose(3)
    page.page.click("[data-tool=box]")

    def box(start, end, key=None):
        if key:
            page.page.keyboard.down(key)
        page.page.mouse.move(*page.place(*start))
        page.page.mouse.down()
        page.page.mouse.move(*page.place(*end), steps=3)
        page.page.mouse.up()
        if key:
            page.page.keyboard.up(key)

    box((0.25, 0.25), (0.75, 0.75))
    box((0.5, 0.0), (1.0, 1.0), "Control")
    page.use("copy")
    page.wait(lambda: bool(page.state()["edit"]))
    assert abs(page.edit().copy.mask.mean() - 0.125) < 0.01  # half of the square
    page.page.keyboard.press("Control+z")
    page.wait(lambda: abs(page.edit().copy.mask.mean() - 0.25) < 0.01)
    page.page.keyboard.press("Control+Shift+z")
    page.wait(lambda: abs(page.edit().copy.mask.mean() - 0.125) < 0.01)
    page.page.click("[data-tool=brush]")
    page.page.mouse.move(*page.place(0.8, 0.8))
    page.page.mouse.down()
    page.page.mouse.move(*page.place(0.9, 0.8), steps=5)
    page.page.mouse.up()
    page.wait(lambda: page.edit().copy.mask[205, 215] == 1)


def test_a_polygon_closes_near_its_start_and_a_lasso_may_leave_the_picture(page):
    page.choose(4)
    page.page.click("[data-tool=polygon]")
    for corner in ((0.2, 0.2), (0.6, 0.2), (0.6, 0.6), (0.2, 0.6), (0.203, 0.203)):
        page.page.mouse.click(*page.place(*corner))
    page.use("copy")
    page.wait(lambda: bool(page.state()["edit"]))
    assert abs(page.edit().copy.mask.mean() - 0.16) < 0.01
    page.choose(5)
    page.page.click("[data-tool=lasso]")
    page.page.mouse.move(*page.place(0.5, 0.5))
    page.page.mouse.down()
    for corner in ((-0.2, 0.5), (-0.2, -0.2), (0.5, -0.2)):
        page.page.mouse.move(*page.place(*corner), steps=4)
    page.page.mouse.up()
    page.use("context")
    page.wait(lambda: bool(page.edit().context))
    assert abs(page.edit().context[0].mask.mean() - 0.25) < 0.02


def test_domes_become_spires_by_mouse(page):
    edit = load_edit("spire")
    page.choose(edit.copy.index)
    page.lasso(edit.copy.mask)
    page.use("copy")
    page.choose(edit.pastes[0].index)
    page.lasso(edit.pastes[0].mask)
    page.use("paste")
    for selection in edit.context[1:]:
        page.choose(selection.index)
        page.lasso(selection.mask)
        page.use("context")
    page.wait(lambda: len(page.edit().context or ()) == 4)
    assert page.edit().rows  # it knows its latents again
    page.wait(lambda: page.page.locator(".verdict").count() == 1)
    live = page.state()["live"]
    assert live["rank"] == 4 and live["size"] < 1
    assert live["measured"]["inside"] > 3 * live["measured"]["outside"]
    assert "Size of the change" in page.page.inner_text("#report")
    page.page.click("#keep")
    page.wait(lambda: page.page.locator("#rules li").count() == 1)
    assert page.page.locator(".tile").count() >= 12


def test_the_keyboard_alone_makes_an_edit(page):
    for row, slot in ((0, "c"), (1, "p"), (2, "x")):
        page.choose(row)
        page.page.focus("#canvas")
        for _ in range(2):
            page.page.keyboard.press("Shift+ArrowLeft")
            page.page.keyboard.press("Shift+ArrowUp")
        page.page.keyboard.press("Enter")
        page.page.keyboard.press("Shift+ArrowRight")
        page.page.keyboard.press("Shift+ArrowDown")
        page.page.keyboard.press("Shift+ArrowDown")
        page.page.keyboard.press("Enter")
        page.page.keyboard.press(slot)
        name = {"c": "copy", "p": "paste", "x": "context"}[slot]
        page.wait(lambda name=name: page.page.locator(f"[data-slot={name}] .card").count() == 1)
    page.page.keyboard.press("Control+Enter")
    page.wait(lambda: page.state()["live"] is not None)


def test_a_reload_and_a_killed_server_lose_nothing(page, server):
    page.choose(9)
    page.lasso(np.pad(np.ones((32, 32)), 16))
    page.use("copy")
    page.wait(lambda: bool(page.state()["edit"]))
    before = page.edit()
    page.open()
    assert page.page.locator("[data-slot=copy] .card").count() == 1
    server.kill()
    page.page.click("#find")
    page.wait(lambda: "does not answer" in page.page.inner_text("#toasts"))
    server.start(server.port)
    page.open()
    assert page.page.locator("[data-slot=copy] .card").count() == 1 and page.edit() == before


def test_two_pages_see_the_same(page, browser, server):
    other = Page(browser, server)
    page.choose(1)
    page.lasso(np.pad(np.ones((32, 32)), 16))
    page.use("copy")
    page.choose(2)
    page.lasso(np.pad(np.ones((32, 32)), 16))
    page.use("paste")
    page.wait(lambda: page.state()["live"] is not None)
    other.open()
    assert other.page.locator(".card").count() == 2 and "Rank 4" in other.page.inner_text("#report")
    other.context.close()


def test_strangers_are_kept_out(page, server):
    def status(path, **headers):
        try:
            return urllib.request.urlopen(urllib.request.Request(page.address(path), headers=headers)).status
        except urllib.error.HTTPError as error:
            return error.code

    assert status("/") == status("/?token=wrong") == status("/api/state") == 403
    token = server.address.partition("token=")[2]
    assert status(f"/?token={token}") == 200
    assert status(f"/?token={token}", Origin="http://evil.example") == 403
    assert status(f"/?token={token}", Host="evil.example") == 403


def test_the_page_can_be_used_without_seeing_it(page):
    """Every control has a name, contrast is in the style sheet's pairs of colours, focus is seen."""
    unnamed = page.page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, a, canvas[tabindex]")].filter((each) =>
            each.offsetParent && !(each.textContent.trim() || each.getAttribute("aria-label") || each.title ||
            each.closest("label")?.textContent.trim() || each.getAttribute("aria-labelledby")))
            .map((each) => each.outerHTML)"""
    )
    assert not unnamed
    page.page.keyboard.press("Tab")
    assert page.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"


def test_pictures_on_the_page_are_the_generators(page):
    page.wait(lambda: page.page.locator(".tile canvas").count() >= 12)
    page.wait(lambda: page.page.evaluate("document.querySelector('.tile canvas').width") != 300)
    shown = page.page.evaluate(
        """() => { const c = document.querySelector(".tile[data-row='0'] canvas");
            return [c.width, ...c.getContext("2d").getImageData(0, 0, c.width, c.height).data]; }"""
    )
    width, data = shown[0], torch.tensor(shown[1:]).reshape(shown[0], -1, 4)[..., :3]
    from rewrite_core.demo import LATENT_SIZE, chapels
    from rewrite_core.pictures import paint, to_image

    picture = to_image(paint(chapels(), rc.sample_latents(LATENT_SIZE, 400))[0], width)
    assert (data - torch.from_numpy(np.array(picture)).int()).abs().max() <= 1
