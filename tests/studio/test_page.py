"""The studio's page in a real browser: drawn on with pointer events, and the saved mask looked at to the pixel."""

from __future__ import annotations

import urllib.error
import urllib.request

import numpy as np
import torch

import rewrite_core as rc
from rewrite_core.benchmarks.bench_studio import bounds
from rewrite_core.demo import load_edit


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
    page.around(edit.copy.mask)
    page.use("copy")
    page.choose(edit.pastes[0].index)
    page.around(edit.pastes[0].mask)
    page.use("paste")
    for selection in edit.context[1:]:
        page.choose(selection.index)
        page.around(selection.mask)
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
