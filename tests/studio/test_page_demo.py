"""The demo's three edits, made on the studio's page by mouse and by keyboard alone: the pictures are the demo's."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.studio_page import Server

import rewrite_core as rc
from rewrite_core.demo import LATENT_SIZE, RULES, chapels, load_edit
from rewrite_core.demo.run import CHOSEN, EDIT_LATENTS, EDIT_SEED, OPTIONS
from rewrite_core.pictures import paint, to_image

ROWS = list(range(12))  # pictures that are looked at
GRID = 64  # cells across the demo's masks
# How far pictures may be from the demo's, as a share of what the demo changes. By keyboard masks are the same to the
# pixel; by mouse an edge is off by a pixel of 256 at most. One rank more changes more than either.
BY_KEYBOARD, BY_MOUSE = 0.02, 0.15


@pytest.fixture(scope="module")
def server(tmp_path_factory, browser_is_there):
    server = Server(tmp_path_factory.mktemp("demo"), count=EDIT_LATENTS)
    yield server
    server.kill()


def spans(mask):
    """A mask's rectangles of whole runs of cells, top to bottom: (left, top, right, bottom)."""
    found, last = [], {}
    for row in range(len(mask)):
        edges = np.flatnonzero(np.diff(np.pad(mask[row] > 0.5, 1).astype(int)))
        runs = {(int(left), int(right)) for left, right in edges.reshape(-1, 2)}
        last = {run: last.get(run) or [run[0], row, run[1], row] for run in runs}
        for part in last.values():
            part[3] = row + 1
            if part[1] == row:
                found.append(part)
    return found


def filled(mask):
    """The mask without its notches: each row from its first cell to its last."""
    right_of, left_of = np.maximum.accumulate(mask, 1), np.maximum.accumulate(mask[:, ::-1], 1)[:, ::-1]
    return np.minimum(right_of, left_of)


def draw_by_mouse(page, mask):
    """The lasso along the edge, up its left and down its right; notches are taken away with Ctrl."""
    whole = filled(mask)
    parts = spans(whole)
    left = [corner for at, top, _, bottom in reversed(parts) for corner in ((at, bottom), (at, top))]
    right = [corner for _, top, at, bottom in parts for corner in ((at, top), (at, bottom))]
    lasso(page, left + right)
    page.page.keyboard.down("Control")
    for left, top, right, bottom in spans(whole - mask):
        lasso(page, [(left, top), (left, bottom), (right, bottom), (right, top)])
    page.page.keyboard.up("Control")


def lasso(page, corners):
    start, *rest = [page.place(x / GRID, y / GRID) for x, y in corners]
    page.page.mouse.move(*start)
    page.page.mouse.down()
    for corner in rest:
        page.page.mouse.move(*corner)
    page.page.mouse.up()


def draw_by_keyboard(page, mask):
    """Rectangles between two places of the cursor, which begins in the middle."""
    keys = page.page.keyboard
    at = [GRID // 2, GRID // 2]

    def go(x, y):
        for axis, wanted, names in ((0, x, ("ArrowLeft", "ArrowRight")), (1, y, ("ArrowUp", "ArrowDown"))):
            way = wanted - at[axis]
            for times, key in ((abs(way) // 8, "Shift+"), (abs(way) % 8, "")):
                for _ in range(times):
                    keys.press(key + names[way > 0])
            at[axis] = wanted

    page.page.focus("#canvas")
    keys.press("ArrowLeft")  # the cursor is there
    keys.press("ArrowRight")
    for left, top, right, bottom in spans(mask):
        go(left, top)
        keys.press("Enter")
        go(right, bottom)
        keys.press("Enter")


def put(page, slot, key):
    """What is drawn goes into a slot, by mouse or by its key."""
    if key is None:
        return page.use(slot)
    count = page.page.locator(f"[data-slot={slot}] .card").count()
    page.page.keyboard.press(key)
    page.wait(lambda: page.page.locator(f"[data-slot={slot}] .card").count() == count + 1)


def pictures(generator, latents):
    return np.stack([np.asarray(to_image(picture, GRID), float) for picture in paint(generator, latents)])


def demo_pictures(name, rank):
    """Before, and after the demo's edit at a rank, as the library makes them: [N, 64, 64, 3], 0..255."""
    generator, latents = chapels(), rc.sample_latents(LATENT_SIZE, EDIT_LATENTS, seed=EDIT_SEED)
    layer = rc.bind(generator, CHOSEN[name][0])
    moment = rc.collect_second_moment(layer, latents, progress=False)
    before = pictures(generator, latents[ROWS])
    with rc.rewrite(layer, moment, load_edit(name), latents, rank=rank, **OPTIONS):
        return before, pictures(generator, latents[ROWS])


# One of them each time; all of them take minutes: pytest -m slow tests/studio runs the others.
CASES = [
    pytest.param(name, by, marks=[] if (name, by) == ("spire", "mouse") else pytest.mark.slow)
    for name in RULES
    for by in ("mouse", "keyboard")
]


@pytest.mark.parametrize(("name", "by"), CASES)
def test_the_demos_edit_makes_the_demos_pictures(page, name, by):
    edit, (layer, rank) = load_edit(name), CHOSEN[name]
    assert edit.copy is not None and edit.context
    page.choose_layer(layer)
    page.page.focus("#live")
    page.page.keyboard.press("Space")  # it is solved when all is there
    page.wait(lambda: not page.page.is_checked("#live"))
    page.open_how()
    page.page.fill("#rank", str(rank))
    page.page.press("#rank", "Enter")
    page.wait(lambda: page.state()["settings"]["rank"] == rank)
    draw = draw_by_mouse if by == "mouse" else draw_by_keyboard
    if by == "mouse":
        page.page.click("[data-tool=lasso]")
    parts = [("copy", "c", edit.copy), *(("paste", "p", each) for each in edit.pastes)]
    parts += [("context", "x", each) for each in edit.context]
    for slot, key, selection in parts:
        if slot != "context" or selection not in edit.pastes:  # just pasted, and used again
            page.choose(selection.index)
            draw(page, selection.mask)
        put(page, slot, None if by == "mouse" else key)
    page.wait(lambda: len(page.edit().context or ()) == len(edit.context))
    made = page.edit()
    off = [
        np.abs(mine.mask - np.kron(theirs.mask, np.ones((256 // GRID,) * 2))).mean()
        for mine, theirs in zip(made.selections, edit.selections, strict=True)
    ]
    assert max(off) == 0 if by == "keyboard" else max(off) < 0.02, off
    if by == "mouse":
        page.page.click("#rewrite")
    else:
        page.page.keyboard.press("Control+Enter")
    page.settle()
    shown = np.stack([np.array(page.tile(row).split(","), float).reshape(GRID, GRID, 4)[..., :3] for row in ROWS])
    before, after = demo_pictures(name, rank)
    _, other = demo_pictures(name, rank + 1)
    changed, limit = np.abs(after - before).mean(), BY_MOUSE if by == "mouse" else BY_KEYBOARD
    assert np.abs(shown - after).mean() < limit * changed
    assert np.abs(shown - before).mean() > 0.8 * changed
    assert np.abs(other - after).mean() > BY_MOUSE * changed  # a wrong edit is told apart
