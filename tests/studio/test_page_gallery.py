"""The gallery's views, orders and zoom: what is shown is compared with the server's own pictures."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from helpers.studio_page import Server
from PIL import Image
from studio.test_page_lasting import make_change

ROWS = (0, 3, 7)
COUNT = 40  # pictures in the studio


@pytest.fixture(scope="module")
def server(tmp_path_factory, browser_is_there):
    server = Server(tmp_path_factory.mktemp("gallery"), count=COUNT)
    yield server
    server.kill()


def shown(page, row):
    """A tile's pixels: [height, width, 3]."""
    width, height, *data = page.page.evaluate(
        """(row) => { const c = document.querySelector(`.tile[data-row='${row}'] canvas`);
            return [c.width, c.height, ...c.getContext("2d").getImageData(0, 0, c.width, c.height).data]; }""",
        row,
    )
    return np.array(data).reshape(height, width, 4)[..., :3]


def painted(page, row, original=False, side=64):
    """What the server paints, from another route than the gallery's."""
    path = f"/api/pictures.png?rows={row}&side={side}&original={int(original)}"
    body = page.page.request.get(page.address(path)).body()
    return np.array(Image.open(io.BytesIO(body)).convert("RGB")).astype(int)


def view(before, after, name):
    """What a tile shows of a picture in each view."""
    if name == "side":
        return np.concatenate([before, after], 1)
    return np.minimum(255, 3 * np.abs(after - before)) if name == "difference" else after


def same(found, wanted, levels=1):
    """To a level: pictures that are computed in batches of other sizes are rounded so."""
    return found.shape == wanted.shape and np.abs(found - wanted).max() <= levels


def wait_for(page, wanted, levels=1):
    """Until tiles show what they should: a picture for each row."""
    page.wait(lambda: all(same(shown(page, row), picture, levels) for row, picture in wanted.items()))


def order(page):
    return page.page.eval_on_selector_all(".tile", "tiles => tiles.map((tile) => Number(tile.dataset.row))")


def zoom(page, *sizes):
    page.page.evaluate(
        """(sizes) => { const zoom = document.getElementById("zoom");
            for (const size of sizes) { zoom.value = size; zoom.dispatchEvent(new Event("input")); } }""",
        sizes,
    )


def test_each_view_shows_what_it_says_at_each_zoom_and_a_held_key_the_originals(page):
    make_change(page)
    for side in (64, 48):
        zoom(page, 60, 55, side + 20, side if side < 64 else 96)
        pictures = {row: (painted(page, row, True, side), painted(page, row, False, side)) for row in ROWS}
        assert np.abs(pictures[0][1] - pictures[0][0]).max() > 20  # there is something to see
        for name in ("edited", "side", "difference"):
            page.page.select_option("#view", name)
            levels = 4 if name == "difference" else 1
            wanted = {row: view(*pictures[row], name) for row in ROWS}
            wait_for(page, wanted, levels)
    before = pictures[0][0]
    for name, wanted in (("side", view(before, before, "side")), ("difference", before), ("edited", before)):
        page.page.select_option("#view", name)
        page.page.focus("#canvas")
        page.page.keyboard.down("o")
        wait_for(page, {0: wanted})
        page.page.keyboard.up("o")
        wait_for(page, {0: view(*pictures[0], name)}, 4)
    page.page.keyboard.down("o")
    page.wait(lambda: same(shown(page, 0), before))
    page.page.evaluate("window.dispatchEvent(new Event('blur'))")  # the key is let go in another window
    page.wait(lambda: not same(shown(page, 0), before))
    page.page.keyboard.up("o")
    page.page.select_option("#view", "blink")
    for picture in (*pictures[0], *pictures[0]):
        wait_for(page, {0: picture})


def test_pairs_are_as_large_as_single_pictures_and_holding_moves_nothing(page):
    width = page.page.locator(".tile").first.bounding_box()["width"]
    page.page.select_option("#view", "side")
    page.wait(lambda: shown(page, 0).shape == (64, 128, 3))
    box = page.page.locator(".tile").nth(3).bounding_box()
    assert box["width"] > 1.9 * width and box["width"] == pytest.approx(2 * box["height"], abs=5)
    button = page.page.locator("#originals").bounding_box()
    page.page.mouse.move(button["x"] + 5, button["y"] + 5)
    page.page.mouse.down()
    assert page.page.locator(".tile").nth(3).bounding_box() == box
    page.page.mouse.up()
    zoom(page, 256)
    frame = page.page.locator("#tiles")
    assert frame.evaluate("(box) => box.scrollWidth <= box.clientWidth")


def test_what_changed_most_comes_first_and_follows_the_edit(page):
    def wanted(without=()):
        rows = ",".join(map(str, range(COUNT)))
        amounts = json.loads(page.page.request.get(page.address(f"/api/differences?rows={rows}")).text())
        return [row for row in sorted(range(COUNT), key=lambda row: -amounts[row]) if row not in without][:12]

    page.page.select_option("#order", "changed")  # there is no change yet
    make_change(page)
    page.wait(lambda: order(page)[:12] != list(range(12)))
    assert order(page)[:12] == wanted()
    mine = {page.edit().copy.index, page.edit().pastes[0].index}
    elsewhere = wanted(mine)
    page.page.select_option("#order", "spilled")
    page.wait(lambda: order(page)[:12] == elsewhere)
    assert not mine & set(order(page))


def test_of_two_orders_the_last_that_was_chosen_is_shown(page):
    make_change(page)
    page.late("/api/differences*", 0.3)
    page.page.select_option("#order", "changed")
    page.page.select_option("#order", "number")
    page.page.wait_for_timeout(900)
    assert order(page)[:6] == list(range(6))


def test_there_are_no_matches_to_order_by_before_a_search(page):
    assert page.page.locator("#order option[value=matches]").is_disabled()
    page.choose(2)
    page.around(np.pad(np.ones((32, 32)), 16))
    page.page.keyboard.press("f")
    page.wait(lambda: page.page.locator("#add-ten").is_visible())
    found = order(page)
    page.page.select_option("#order", "number")
    page.page.select_option("#order", "matches")
    page.wait(lambda: order(page) == found)


def test_two_steps_to_the_next_picture_are_two_pictures(page):
    page.late("/api/pictures.png*", 0.3)
    page.page.focus("#canvas")
    for _ in range(3):
        page.page.keyboard.press(".")
    page.page.keyboard.press(",")
    page.wait(lambda: page.page.get_attribute("body", "data-row") == "2")
