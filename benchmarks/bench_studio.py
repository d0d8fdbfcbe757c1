"""The studio, measured in the browser: ``rewrite bench studio``.

Chromium, driven by Playwright with real pointer events, on the embedded generator. The page's own marks say when a
lasso was released and when pictures were painted; the screen follows within one frame. Nothing is reported where the
page does not show what the library computes.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from rewrite_core import Edit, SecondMoment, bind, rewrite, sample_latents
from rewrite_core.demo import LATENT_SIZE, chapels, load_edit
from rewrite_core.pictures import paint, to_image

from . import report
from .harness import Refused
from .lines import append

LAYER = "synthesis.layer4.conv"
COUNT = 400
TARGETS = {"first picture": 0.120, "24 pictures": 0.250, "updates a second": 8.0, "dome to spire": 15.0}
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
PATIENCE = 120_000  # milliseconds
QUICK, WHOLE = 3, 31  # releases of the lasso


@contextlib.contextmanager
def studio(folder: Path) -> Iterator[str]:
    """`rewrite studio` on the embedded generator; yields its address."""
    command = [sys.executable, "-m", "rewrite_core", "studio", "--no-browser", "--port", "0", "--count", str(COUNT)]
    process = subprocess.Popen([*command, "--quiet"], cwd=folder, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address.startswith("http://127.0.0.1:"):
            raise Refused("The studio did not start, so there is no speed to report.")
        yield address
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def browser_page(address: str, scheme: Literal["light", "dark"] = "light") -> Iterator[Any]:
    """The page in Chromium, 1280 x 720, light or dark. Raises Refused where there is none to drive."""
    chromium = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        raise Refused("The studio is measured with playwright: run `pip install '.[test]'` in a checkout.") from None
    if chromium is None:
        raise Refused("The studio is measured in Debian's chromium, which is not installed: apt-get install chromium.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_context(viewport={"width": 1280, "height": 720}, color_scheme=scheme).new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        page.wait_for_selector("body[data-ready]")
        yield page
        browser.close()


def bounds(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of what a mask marks, 0..1."""
    rows, columns = np.nonzero(mask > 0.5)
    height, width = mask.shape
    return columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height


class Hand:
    """What a person does on the page, by mouse."""

    def __init__(self, page: Any):
        self.page = page
        self.base = page.url.partition("?")[0].rstrip("/")

    def wait(self, what: str, until: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE / 1000
        while not until():
            if time.monotonic() > end:
                raise Refused(f"The page did not get to this: {what}; so there is no speed to report.")
            self.page.wait_for_timeout(5)

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = self.page.request.get(f"{self.base}/api/state").json()
        return found

    def choose(self, row: int) -> None:
        self.page.fill("#goto", str(row))
        self.page.press("#goto", "Enter")
        self.page.wait_for_selector(f"body[data-row='{row}']")

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a place of the picture, 0..1 across and down, is on the screen."""
        box = self.page.locator("#canvas").bounding_box()
        side = min(box["width"], box["height"])
        return box["x"] + (box["width"] - side) / 2 + x * side, box["y"] + (box["height"] - side) / 2 + y * side

    def lasso(self, left: float, top: float, right: float, bottom: float) -> None:
        corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
        self.page.mouse.move(*self.place(*corners[0]))
        self.page.mouse.down()
        for corner in corners[1:]:
            self.page.mouse.move(*self.place(*corner), steps=3)
        self.page.mouse.up()

    def around(self, mask: np.ndarray) -> None:
        """The lasso along the rectangle of what a mask marks."""
        self.lasso(*bounds(mask))

    def use(self, slot: str) -> None:
        cards = self.page.locator(f"[data-slot={slot}] .card")
        wanted = 1 if slot == "copy" else cards.count() + 1
        self.page.click(f"#use-{slot}")
        self.wait(f"{wanted} in {slot}", lambda: cards.count() == wanted)

    def painted(self) -> int:
        return int(self.page.get_attribute("body", "data-painted") or 0)

    def settle(self, before: int) -> None:
        """Until the gallery has followed, once it was painted `before` times. The page says so itself: to ask it again
        and again would take time from what is measured."""
        followed = self.page.evaluate(
            """([before, patience]) => new Promise((done) => {
                const look = () => {
                    const { body } = document;
                    if (body.hasAttribute("data-busy") || !(Number(body.dataset.painted) > before)) return;
                    watch.disconnect();
                    done(true);
                };
                const watch = new MutationObserver(look);
                watch.observe(document.body, { attributes: true });
                setTimeout(() => { watch.disconnect(); done(false); }, patience);
                look();
            })""",
            [before, PATIENCE],
        )
        if not followed:
            raise Refused("The gallery did not follow the edit, so there is no speed to report.")

    def marks(self) -> tuple[float, float]:
        """Seconds from the release of the lasso to the first updated picture and to 24."""
        first, many = self.page.evaluate(
            """() => { const at = (name) => performance.getEntriesByName(name).at(-1)?.startTime ?? NaN;
                return [at("first") - at("released"), at("twenty-four") - at("released")]; }"""
        )
        return first / 1000, many / 1000


def draw_spire(hand: Hand) -> float:
    """The demo's first edit by mouse; seconds until the gallery shows it."""
    edit, start = load_edit("spire"), time.monotonic()
    assert edit.copy is not None
    before = hand.painted()
    for slot, selections in (("copy", [edit.copy]), ("paste", edit.pastes), ("context", edit.context or ())):
        for selection in selections:
            if slot == "context" and selection.index == edit.pastes[0].index:
                continue  # the pasted place is of the context as it is
            hand.choose(selection.index)
            hand.around(selection.mask)
            hand.use(slot)
    hand.settle(before)
    return time.monotonic() - start


def check(hand: Hand, folder: Path) -> float:
    """The largest difference, 0..1, of a picture on the page from what the library makes of the saved edit.

    Raises Refused above one level of 255.
    """
    text = hand.page.request.get(f"{hand.base}/api/edit.json").text()
    z, generator = sample_latents(LATENT_SIZE, COUNT), chapels()
    layer, settings = bind(generator, LAYER), hand.state()["settings"]
    (moment,) = folder.glob("studio/moment-*.safetensors")
    how = {name: settings[name] for name in ("rank", "loss", "region", "preserve", "objective")}
    change = rewrite(layer, SecondMoment.load(moment), Edit.from_json(text).on(z), z, **how)
    rows = list(range(8))
    with change:
        wanted = paint(generator, z[rows])
    worst = 0.0
    for row in rows:
        width, *pixels = hand.page.evaluate(
            """(row) => { const c = document.querySelector(`.tile[data-row='${row}'] canvas`);
                return [c.width, ...c.getContext("2d").getImageData(0, 0, c.width, c.height).data]; }""",
            row,
        )
        shown = np.array(pixels).reshape(width, width, 4)[..., :3].astype(float)
        worst = max(worst, np.abs(shown - np.asarray(to_image(wanted[row], width), float)).max() / 255)
    if not worst <= 1.01 / 255:
        raise Refused(
            f"The page does not show what the library computes (off by {worst:.3f}), so no speed is reported."
        )
    return worst


def releases(hand: Hand, rounds: int) -> list[tuple[float, float]]:
    """The paste is drawn on, a little at another place each time."""
    hand.page.click("[data-slot=paste] .card")
    hand.wait("the paste on the picture", lambda: hand.page.inner_text("#picture-name") == "the paste")
    found = []
    for number in range(rounds):
        before = hand.painted()
        x, y = 0.30 + 0.01 * (number % 10), 0.20 + 0.01 * (number // 10)
        hand.lasso(x, y, x + 0.05, y + 0.05)
        hand.settle(before)
        found.append(hand.marks())
    return found


def drags(hand: Hand, seconds: float) -> tuple[float, float]:
    """Updates a second while the strength is dragged to and fro, a step of the slider at a time, and how often a second
    all visible pictures were through: an update may be of some of them, the next of the others."""
    slider = hand.page.locator("#strength")
    slider.scroll_into_view_if_needed()
    box, before = slider.bounding_box(), slider.input_value()
    middle = box["y"] + box["height"] / 2

    def counts() -> list[int]:
        return [int(hand.page.get_attribute("body", f"data-{name}") or 0) for name in ("drags", "rounds")]

    hand.page.mouse.move(box["x"] + box["width"] * 0.66, middle)
    hand.page.mouse.down()
    start, first = time.monotonic(), counts()
    step = 0
    while time.monotonic() - start < seconds:
        step += 1
        share = 0.2 + 0.6 * abs(step / 36 % 2 - 1)
        hand.page.mouse.move(box["x"] + box["width"] * share, middle)
        hand.page.wait_for_timeout(16)
    took = time.monotonic() - start
    last = counts()
    moved = slider.input_value() != before
    hand.page.mouse.up()
    if not moved:
        raise Refused("The slider did not follow the mouse, so there is no speed to report.")
    updates, rounds = ((after - count) / took for after, count in zip(last, first, strict=True))
    return updates, rounds


def measure(quick: bool) -> dict[str, Any]:
    """All of it, once. Raises Refused where the page is wrong, or cannot be driven."""
    with tempfile.TemporaryDirectory() as name, studio(Path(name)) as address, browser_page(address) as page:
        hand = Hand(page)
        spire = draw_spire(hand)
        hand.wait("a painted gallery", lambda: page.locator(".tile").count() >= 24)
        page.wait_for_timeout(1500)  # until all of it is there
        off = check(hand, Path(name))
        marks = releases(hand, QUICK if quick else WHOLE)
        updates, rounds = drags(hand, 1.0 if quick else 4.0)
    first, many = (sorted(values) for values in zip(*marks))
    return {
        "first picture": statistics.median(first),
        "24 pictures": statistics.median(many),
        "updates a second": updates,
        "rounds a second": rounds,
        "dome to spire": spire,
        "spread": {"first picture": [first[0], first[-1]], "24 pictures": [many[0], many[-1]]},
        "releases": len(marks),
        "error": off,
    }


def lines(found: dict[str, Any]) -> str:
    """The table."""
    text = io.StringIO()
    for name, target in TARGETS.items():
        rate = name == "updates a second"
        value = found[name]
        unit = "a second" if rate else "ms" if target < 1 else "s"
        scale = 1000 if unit == "ms" else 1
        good = value >= target if rate else value <= target
        spread = found["spread"].get(name)
        told = f" ({scale * spread[0]:.0f} to {scale * spread[1]:.0f})" if spread else ""
        label = "slider drags" if rate else name
        verdict = "met" if good else "MISSED"
        text.write(f"{label:16} {scale * value:8.1f} {unit:9}{told:16} target {scale * target:.0f} {verdict}\n")
    text.write(f"{'':16} {found['rounds a second']:8.1f} times a second all visible pictures were through\n")
    return text.getvalue().rstrip()


def record(found: dict[str, Any]) -> dict[str, Any]:
    """The line that is kept."""
    return {"op": "studio", "case": "chapels in chromium", "threads": torch.get_num_threads(), **found}


def main(out: Path, quick: bool) -> int:
    """``rewrite bench studio``: the exit status of :func:`.runner.main`."""
    here = report.environment()
    commit = (here["commit"] or "-")[:12]
    print(f"{here['cpu']}, torch {here['torch']}, commit {commit}, load average {here['load']}", flush=True)
    if here["load"] > report.QUIET:
        print(f"note: {report.disturbance(here)}", flush=True)
    path = out / f"{here['machine']}.studio{'.quick' * quick}.jsonl"
    try:
        out.mkdir(parents=True, exist_ok=True)
        found = measure(quick)
        append(path, {**here, "quick": quick, **record(found)})
    except Refused as refusal:
        print(refusal, file=sys.stderr, flush=True)
        return 1
    except OSError as error:
        print(f"Results cannot go to {out} ({error.strerror}): choose another folder.", file=sys.stderr)
        return 2
    print(lines(found), f"-> {path}", sep="\n", flush=True)
    return 0
