"""Several things at once on the studio's page: answers that come late, and lists that change under a person's hand."""

from __future__ import annotations

from helpers.studio_page import Page
from studio.test_page_lasting import make_change

NODE = "(selector) => { window.node = document.querySelector(selector); }"
SAME = "(selector) => window.node === document.querySelector(selector) && window.node.isConnected"


def keep(page):
    make_change(page)
    count = page.page.locator("#rules li").count()
    page.page.click("#keep")
    page.wait(lambda: page.page.locator("#rules li").count() == count + 1)


def test_a_switch_right_after_a_name_takes_the_name_not_back(page):
    keep(page)
    page.late("/api/state", 1.0)  # the page does not know the new name yet when the box is clicked
    page.page.fill("#rules input[type=text]", "spires")
    page.page.press("#rules input[type=text]", "Enter")
    page.wait(lambda: page.state()["rules"][0]["name"] == "spires")
    page.page.click("#rules input[type=checkbox]")
    page.wait(lambda: not page.state()["rules"][0]["on"])
    assert page.state()["rules"][0]["name"] == "spires"
    page.page.click("[aria-label='Take spires off']")
    page.wait(lambda: page.state()["rules"] == [] and page.page.locator("#rules li").count() == 0)


def test_two_moves_before_the_first_is_answered(page):
    for _ in range(3):
        keep(page)
    numbers = [rule["number"] for rule in page.state()["rules"]]
    page.late("/api/rules/order", 0.5)
    up = page.page.locator("#rules li").nth(2).locator("[data-part=up]")
    node = up.element_handle()
    node.click()
    node.click()
    page.wait(lambda: [rule["number"] for rule in page.state()["rules"]] == [numbers[2], *numbers[:2]])
    assert node.evaluate("(node) => node.isConnected && document.activeElement === node")


def test_a_list_that_changes_leaves_what_is_typed_and_pressed(page, browser, server):
    """Another page adds a rule and renames one while a name is typed and a button is held here."""
    other = Page(browser, server)
    keep(page)
    other.wait(lambda: other.page.locator("#rules li").count() == 1)
    page.page.focus("#rules input[type=text]")
    page.page.keyboard.press("End")
    page.page.keyboard.type(" of old")
    page.page.evaluate(NODE, "#rules input[type=text]")
    keep(other)
    page.wait(lambda: page.page.locator("#rules li").count() == 2)
    page.page.keyboard.type(" chapels")
    page.page.keyboard.press("Enter")
    page.wait(lambda: page.state()["rules"][0]["name"].endswith(" of old chapels"))
    assert page.page.evaluate(SAME, "#rules input[type=text]")

    button = page.page.locator("#rules li").nth(1).locator("[data-part=off]")
    button.scroll_into_view_if_needed()
    place = button.bounding_box()
    page.page.mouse.move(place["x"] + 5, place["y"] + 5)
    page.page.mouse.down()
    name = other.page.locator("#rules input[type=text]").nth(0)
    name.fill("theirs")
    name.press("Enter")
    page.wait(lambda: page.names()[0] == "theirs")
    page.page.mouse.up()
    page.wait(lambda: len(page.state()["rules"]) == 1 and page.page.locator("#rules li").count() == 1)
    other.close()


def test_strokes_can_be_undone_after_another_page_has_changed_something_else(page, browser, server):
    make_change(page)
    other = Page(browser, server)
    page.page.click("[data-slot=paste] .card")
    page.wait(lambda: page.page.inner_text("#picture-name") == "the paste")
    page.page.evaluate(NODE, "[data-slot=paste] .card")
    page.page.click("[data-tool=box]")
    page.page.mouse.move(*page.place(0.05, 0.05))
    page.page.mouse.down()
    page.page.mouse.move(*page.place(0.2, 0.2), steps=3)
    page.page.mouse.up()
    page.settle()
    other.wait(lambda: other.page.locator("body[data-busy]").count() == 0)
    other.page.click("#how summary")
    other.page.fill("#rank", "2")
    other.page.press("#rank", "Enter")
    page.wait(lambda: page.page.input_value("#rank") == "2")
    assert page.page.evaluate(SAME, "[data-slot=paste] .card") and page.state()["settings"]["rank"] == 2
    before = page.edit().pastes[0].mask.sum()
    page.page.keyboard.press("Control+z")
    page.wait(lambda: page.edit().pastes[0].mask.sum() < before)
    assert page.state()["settings"]["rank"] == 2
    other.close()


def test_a_number_that_is_typed_is_left_alone_when_the_picture_is_painted_again(page):
    make_change(page)
    page.late("/api/fit", 1.5)
    page.page.click("#rewrite")
    page.page.focus("#goto")
    page.page.keyboard.press("Control+a")
    page.page.keyboard.type("12")
    page.wait(lambda: page.page.locator("body[data-busy]").count() == 0)
    assert page.page.input_value("#goto") == "12"
    page.page.keyboard.press("Enter")
    page.wait(lambda: page.page.get_attribute("body", "data-row") == "12")


def test_a_picture_that_is_chosen_while_another_is_painted_is_the_one_that_opens(page):
    make_change(page)
    page.late("/api/pictures.png*", 0.4)
    page.page.click("#rewrite")
    page.page.click(".tile[data-row='9']")
    page.wait(lambda: page.page.locator("body[data-busy]").count() == 0)
    page.wait(lambda: page.page.get_attribute("body", "data-row") == "9")
    page.page.wait_for_timeout(800)
    assert page.page.get_attribute("body", "data-row") == "9"
