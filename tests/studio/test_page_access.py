"""Whether everybody can use the studio's page: axe-core finds nothing serious, and all has names and focus."""

from __future__ import annotations

import importlib.resources

import numpy as np
import pytest

pytest.importorskip("axe_playwright_python", reason="it has axe-core: run `pip install '.[test]'`")
AXE = importlib.resources.files("axe_playwright_python") / "axe.min.js"


def serious(page):
    """What axe-core finds serious or critical, in a line each."""
    page.page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.page.evaluate("axe.run().then((result) => result.violations)")
    return [
        f"{each['id']}: {each['help']}: {node['html'][:160]} {node.get('failureSummary', '')}"
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_keeps_people_from_the_page(page, scheme):
    page.page.emulate_media(color_scheme=scheme)
    assert serious(page) == []  # the first visit
    for row, slot in ((6, "copy"), (0, "paste")):
        page.choose(row)
        page.around(np.pad(np.ones((32, 32)), 16))
        page.use(slot)
    page.settle()
    page.page.click("#find")
    page.wait(lambda: page.page.locator("#add-ten").is_visible())
    page.page.click("#how summary")
    page.page.click("#layer-strip summary")
    page.wait(lambda: page.page.locator("#layers button").count() > 2)
    assert serious(page) == []
    page.page.click("#keep")
    page.wait(lambda: page.page.locator("#rules li").count() == 1)
    page.page.click("#files summary")
    assert serious(page) == []
    page.page.click("#files summary")
    page.page.click("#help")
    assert serious(page) == []


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
