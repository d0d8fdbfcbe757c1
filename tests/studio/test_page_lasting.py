"""What lasts and what is shared on the studio's page, in a real browser: rules, reloads, killed servers, two tabs."""

from __future__ import annotations

import numpy as np
from helpers.studio_page import Page

import rewrite_core as rc

MIDDLE = np.pad(np.ones((32, 32)), 16)


def make_change(page, copy=6, paste=0, mask=MIDDLE):
    """A copy and a paste by mouse, and the change they make."""
    for row, slot in ((copy, "copy"), (paste, "paste")):
        page.choose(row)
        page.around(mask)
        page.use(slot)
    page.settle()


def test_a_reload_and_a_killed_server_lose_nothing(page, server):
    page.choose(9)
    page.around(np.pad(np.ones((32, 32)), 16))
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
    page.around(np.pad(np.ones((32, 32)), 16))
    page.use("copy")
    page.choose(2)
    page.around(np.pad(np.ones((32, 32)), 16))
    page.use("paste")
    page.wait(lambda: page.state()["live"] is not None)
    other.open()
    assert other.page.locator(".card").count() == 2 and "Rank 4" in other.page.inner_text("#report")
    other.close()


def test_a_rule_is_kept_renamed_switched_and_taken_off(page):
    make_change(page)
    with_change = page.tile(0)
    page.page.click("#keep")
    page.wait(lambda: page.page.locator("#rules li").count() == 1)
    assert page.page.locator("#keep").is_hidden()
    page.page.fill("#rules input[type=text]", "spires")
    page.page.press("#rules input[type=text]", "Enter")
    page.wait(lambda: page.state()["rules"][0]["name"] == "spires")
    page.wait(lambda: page.tile(0) == with_change)
    page.page.click("#rules input[type=checkbox]")
    page.wait(lambda: not page.state()["rules"][0]["on"])
    page.wait(lambda: page.tile(0) != with_change)
    page.page.click("[aria-label='Take spires off']")
    page.wait(lambda: page.state()["rules"] == [] and page.page.locator("#rules li").count() == 0)


def test_rules_are_put_in_another_order_by_mouse_and_by_keyboard(page):
    for name in ("first", "second", "third"):
        make_change(page)
        page.page.click("#keep")
        page.wait(lambda: page.page.locator("#keep").is_hidden())
        page.page.locator("#rules input[type=text]").last.fill(name)
        page.page.locator("#rules input[type=text]").last.press("Enter")
        page.wait(lambda name=name: page.names()[-1] == name)
        page.page.click("#fresh")
        page.wait(lambda: page.page.locator(".card").count() == 0)
    page.page.locator("#rules .grip").nth(2).drag_to(page.page.locator("#rules li").nth(0))
    page.wait(lambda: page.names() == ["third", "first", "second"])
    page.page.click("[aria-label='Move third down']")
    page.wait(lambda: page.names() == ["first", "third", "second"])
    page.page.focus("[aria-label='Move second up']")
    page.page.keyboard.press("Enter")
    page.wait(lambda: page.names() == ["first", "second", "third"])
    assert "Acts on the same features" in page.page.inner_text("#rules")
    page.wait(lambda: [rule["name"] for rule in page.state()["rules"]] == page.names())  # the server has heard of it
    page.open()
    assert page.names() == ["first", "second", "third"]


def test_a_saved_rule_is_dropped_onto_the_page(page, tmp_path):
    make_change(page)
    page.page.click("#keep")
    page.wait(lambda: page.page.locator("#rules li").count() == 1)
    with page.page.expect_download() as download:
        page.page.click("#rules a")
    file = tmp_path / "theirs.safetensors"
    download.value.save_as(file)
    assert rc.Rewrite.load(file).rank == 4
    page.page.click("#rules [aria-label^='Take']")
    page.wait(lambda: page.state()["rules"] == [])
    page.drop(file)
    page.wait(lambda: page.names() == ["theirs"])
    edit = tmp_path / "theirs.json"
    page.edit_of_others().save(edit)
    page.drop(edit)
    page.wait(lambda: page.page.locator("[data-slot=context] .card").count() == 1)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no rule")
    page.drop(broken)
    page.wait(lambda: page.page.inner_text("#toasts") != "")
    assert page.names() == ["theirs"]


def test_a_server_that_was_killed_while_it_worked_knows_everything_but_the_last_stroke(page, server):
    make_change(page)
    page.page.click("#keep")
    page.wait(lambda: page.page.locator("#rules li").count() == 1)
    before = page.edit()
    page.page.click("[data-slot=paste] .card")
    page.around(np.pad(np.ones((16, 16)), ((8, 40), (8, 40))))
    server.kill()  # in the middle of it
    server.start(server.port)
    page.open()
    assert page.page.locator("#rules li").count() == 1 and page.edit().copy == before.copy
    assert len(page.edit().pastes) == 1


def test_two_tabs_follow_each_other(page, browser, server):
    other = Page(browser, server)
    make_change(page)
    other.wait(lambda: other.page.locator(".card").count() == 2)
    page.wait(lambda: page.tile(0) == other.tile(0))
    other.page.click("#keep")
    page.wait(lambda: page.page.locator("#rules li").count() == 1)
    page.page.click("#rules input[type=checkbox]")
    other.wait(lambda: not other.page.locator("#rules input[type=checkbox]").is_checked())
    other.close()


def test_an_edit_is_begun_anew(page):
    make_change(page)
    page.page.click("#fresh")
    page.wait(lambda: page.page.locator(".card").count() == 0 and page.state()["live"] is None)
    page.wait(lambda: not any(page.state()["edit"].get(part) for part in ("object", "paste", "key")))  # it is saved
    assert page.page.locator("#fresh").is_hidden() and page.page.locator("#rewrite").is_disabled()
    page.open()
    assert page.page.locator(".card").count() == 0
