"""The page by finger, wheel and middle button, and a film that is saved: what mice and keys do not do."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from helpers.studio_page import Server
from PIL import Image

from rewrite_core.benchmarks.bench_studio import bounds

COUNT = 160


@pytest.fixture(scope="module")
def server(tmp_path_factory, browser_is_there):
    server = Server(tmp_path_factory.mktemp("touch"), count=COUNT)
    yield server
    server.kill()


class Finger:
    """Touches of the page, as a tablet sends them."""

    def __init__(self, page):
        self.page, self.session = page, page.context.new_cdp_session(page.page)

    def send(self, kind, *places):
        points = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(places)]
        self.session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    def draw(self, *places):
        self.send("touchStart", places[0])
        for start, end in itertools.pairwise(places):
            for share in (0.25, 0.5, 0.75, 1.0):
                self.send("touchMove", tuple(a + share * (b - a) for a, b in zip(start, end)))
        self.send("touchEnd")


def corners(page, *places):
    return [page.place(*place) for place in places]


def test_a_finger_draws_a_lasso(page):
    page.choose(3)
    finger = Finger(page)
    page.page.evaluate(
        "document.getElementById('canvas').addEventListener('pointerdown', (e) => { window.by = e.pointerType; })"
    )
    finger.draw(*corners(page, (0.25, 0.25), (0.75, 0.25), (0.75, 0.5), (0.25, 0.5)))
    page.use("copy")
    page.wait(lambda: bool(page.state()["edit"]))
    copy = page.edit().copy
    assert page.page.evaluate("window.by") == "touch" and copy.index == 3
    assert np.abs(np.array(bounds(copy.mask)) - (0.25, 0.25, 0.75, 0.5)).max() <= 2 / 256


def box(page, start, end):
    """A rectangle between two places of the screen."""
    page.page.click("[data-tool=box]")
    page.page.mouse.move(*start)
    page.page.mouse.down()
    page.page.mouse.move(*end, steps=3)
    page.page.mouse.up()


def drawn(page):
    page.use("copy")
    page.wait(lambda: bool(page.state()["edit"]))
    return np.array(bounds(page.edit().copy.mask))


@pytest.mark.parametrize("how", ["middle", "space"])
def test_wheel_and_pan(page, how):
    """Twice as large about a place, then moved: what is drawn then is where the picture shows it."""
    page.choose(5)
    at, start, end = corners(page, (0.5, 0.5), (0.5, 0.5), (0.7, 0.6))
    side = page.place(1, 0)[0] - page.place(0, 0)[0]
    page.page.mouse.move(*at)
    page.page.mouse.wheel(0, -400 * np.log(2))
    page.page.wait_for_timeout(100)
    if how == "space":
        page.page.focus("#canvas")
        page.page.keyboard.down("Space")
    page.page.mouse.down(button="left" if how == "space" else "middle")
    page.page.mouse.move(at[0] + side / 4, at[1], steps=3)
    page.page.mouse.up(button="left" if how == "space" else "middle")
    if how == "space":
        page.page.keyboard.up("Space")
    box(page, start, end)
    # the picture's middle is a quarter to the right now: half as far in its own pixels
    assert np.abs(drawn(page) - (0.375, 0.5, 0.475, 0.55)).max() <= 3 / 256
    page.page.mouse.move(*at)
    page.page.mouse.wheel(0, 4000)  # back to the whole of it


def test_two_fingers_zoom_and_pan_and_draw_nothing(page):
    """They end twice as far apart, and a quarter to the right: what the first had begun is let go."""
    page.choose(4)
    finger = Finger(page)
    left, right, middle = corners(page, (0.4, 0.5), (0.6, 0.5), (0.5, 0.5))
    side = page.place(1, 0)[0] - page.place(0, 0)[0]
    finger.send("touchStart", left)
    finger.send("touchMove", (left[0] - 3, left[1]))
    finger.send("touchStart", (left[0], left[1]), right)
    for share in (0.25, 0.5, 0.75, 1.0):
        moved, spread = share * side / 4, share * side / 10
        finger.send("touchMove", (left[0] + moved - spread, left[1]), (right[0] + moved + spread, right[1]))
    finger.send("touchEnd", (right[0] + side / 4, right[1]))
    finger.send("touchMove", (right[0], right[1]))  # the one that is left
    finger.send("touchEnd")
    assert page.page.locator("#use-copy").is_disabled()
    box(page, middle, corners(page, (0.7, 0.6))[0])
    assert np.abs(drawn(page) - (0.375, 0.5, 0.475, 0.55)).max() <= 4 / 256


def test_a_film_is_saved(page):
    page.page.click("#files summary")
    with page.page.expect_download() as told:
        page.page.click("#save-walk")
    film = Image.open(io.BytesIO(Path(told.value.path()).read_bytes()))
    assert told.value.suggested_filename == "walk.gif" and film.format == "GIF" and film.n_frames > 10
    frames = []
    for number in (0, film.n_frames // 3):
        film.seek(number)
        frames.append(np.array(film.convert("RGB"), int))
    assert film.size == (256, 256) and np.abs(frames[0] - frames[1]).mean() > 1


def test_pictures_that_were_scrolled_past_are_let_go_and_come_back(page):
    held = "[...document.querySelectorAll('.tile canvas')].filter((each) => each.width && each.width !== 300).length"
    frame = page.page.locator("#tiles")
    page.wait(lambda: page.page.evaluate(held) >= 24)
    first = page.tile(0)
    page.wait(
        lambda: (
            frame.evaluate("(box) => { box.scrollTop = box.scrollHeight; }") is None
            and page.page.locator(".tile").count() == COUNT
        )
    )
    page.wait(lambda: page.page.evaluate("document.querySelector(\".tile[data-row='0'] canvas\").width") == 0)
    last = f"document.querySelector(\".tile[data-row='{COUNT - 1}'] canvas\").width"
    page.wait(lambda: page.page.evaluate(last) == 64)
    page.page.wait_for_timeout(300)
    assert page.page.evaluate(held) < 0.7 * COUNT
    frame.evaluate("(box) => { box.scrollTop = 0; }")
    page.wait(lambda: page.page.evaluate("document.querySelector(\".tile[data-row='0'] canvas\").width") == 64)
    assert page.tile(0) == first


def test_sorting_shows_how_far_it_is(page):
    page.late("/api/differences*", 0.3)
    page.page.select_option("#order", "changed")
    page.wait(lambda: page.page.locator("#sorted").is_visible())
    page.wait(lambda: 0 < page.page.evaluate("document.getElementById('sorted').position") < 1)
    page.page.select_option("#order", "number")
    page.wait(lambda: not page.page.locator("#sorted").is_visible())
