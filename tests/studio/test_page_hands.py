"""What hands do on the studio's page beside the tools: a selection that is dragged, polygons and zoom by keyboard."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.studio_page import Server


@pytest.fixture(scope="module")
def server(tmp_path_factory, browser_is_there):
    server = Server(tmp_path_factory.mktemp("hands"), count=40)
    yield server
    server.kill()


def press(page, *keys):
    for key in keys:
        page.page.keyboard.press(key)


def test_a_selection_is_dragged_into_each_slot(page):
    for row, slot in ((6, "copy"), (0, "paste"), (1, "paste"), (2, "context")):
        page.choose(row)
        assert page.page.locator("#carry").is_hidden()  # there is nothing to drag
        page.around(np.pad(np.ones((32, 32)), 16))
        before = page.page.locator(".card").count()
        start, end = (page.page.locator(each).bounding_box() for each in ("#carry", f"[data-slot={slot}] .cards"))
        page.page.mouse.move(start["x"] + 8, start["y"] + 8)
        page.page.mouse.down()
        page.page.mouse.move(end["x"] + 20, end["y"] + 20, steps=4)
        assert page.page.locator(".slot.over").get_attribute("data-slot") == slot
        page.page.mouse.up()
        page.wait(lambda before=before: page.page.locator(".card").count() == before + 1)
        assert page.page.locator(".slot.over").count() == 0
    page.wait(lambda: len(page.edit().context or ()) == 1)
    edit = page.edit()
    assert edit.copy.index == 6 and [each.index for each in edit.pastes] == [0, 1] and edit.context[0].index == 2
    page.page.mouse.move(start["x"] + 8, start["y"] + 8)
    page.page.mouse.down()
    page.page.mouse.move(5, 5, steps=2)  # beside every slot
    page.page.mouse.up()
    page.page.wait_for_timeout(100)
    assert page.page.locator(".card").count() == 4


@pytest.mark.parametrize("closed", ["near its start", "twice at its end"])
def test_a_polygon_is_drawn_by_keyboard(page, closed):
    page.choose(4)
    page.page.focus("#canvas")
    press(page, "g")
    right, down, left, up = (
        ["Shift+ArrowRight"] * 2,
        ["Shift+ArrowDown"] * 2,
        ["Shift+ArrowLeft"] * 2,
        ["Shift+ArrowUp"] * 2,
    )
    press(page, "ArrowLeft", "ArrowRight", "Enter", *right, "Enter", *down, "Enter")  # from the middle
    if closed == "near its start":
        press(page, *left, "Enter", *up, "Enter")
        wanted = 1 / 16
    else:
        press(page, "Enter")
        wanted = 1 / 32  # a triangle
    press(page, "c")
    page.wait(lambda: bool(page.state()["edit"]))
    mask = page.edit().copy.mask
    assert abs(mask.mean() - wanted) < 0.003
    assert mask[120:, :].sum() == mask[:, 120:].sum() == mask.sum() and mask[136, 180] == 1


def test_the_picture_is_enlarged_by_keyboard_and_the_cursor_stays_in_sight(page):
    def share():
        """Of the stage that the cursor's cross is at: its white pixels' middle, 0..1."""
        return page.page.evaluate(
            """() => { const c = document.getElementById("canvas"), { width, height } = c;
                const data = c.getContext("2d").getImageData(0, 0, width, height).data;
                let [n, x, y] = [0, 0, 0];
                for (let i = 0; i < width * height; i++) if (data[4 * i] + data[4 * i + 1] + data[4 * i + 2] === 765) {
                    n++; x += i % width; y += Math.floor(i / width); }
                return n ? [x / n / width, y / n / height] : null; }"""
        )

    page.choose(2)
    page.page.uncheck("#grid")
    page.page.focus("#canvas")
    press(page, "ArrowLeft", "ArrowRight", *["+"] * 6)
    page.wait(lambda: share() is not None)
    assert np.abs(np.array(share()) - 0.5).max() < 0.03  # it is enlarged about the cursor
    press(page, *["Shift+ArrowRight"] * 3)
    page.wait(lambda: share() is not None and 0.9 < share()[0] < 1)
    press(page, *["-"] * 6)
    page.wait(lambda: share() is not None and 0.8 < share()[0] < 0.95)  # 7 eighths of the whole picture


def test_how_many_units_are_erased_is_said_and_kept(page):
    page.choose(0)
    page.around(np.pad(np.ones((32, 32)), 16))
    page.use("paste")
    page.open_how()
    page.page.click("#erase")
    page.settle()
    sizes = [page.state()["live"]["size"]]
    assert page.page.get_by_label("Erase this many units").input_value() == "30"
    for units in ("3", "60"):
        page.page.fill("#units", units)
        page.page.press("#units", "Enter")
        page.wait(lambda: page.state()["live"]["size"] not in sizes)
        assert page.state()["live"]["kind"] == "erase" and page.state()["settings"]["units"] == int(units)
        sizes.append(page.state()["live"]["size"])
    page.open()
    assert page.page.input_value("#units") == "60"
