"""The pictures of docs/studio.md: ``python docs/studio_pictures.py`` draws them again, in Chromium, by mouse."""

import tempfile
from pathlib import Path

from rewrite_core.benchmarks.bench_studio import Hand, browser_page, studio

PICTURES = Path(__file__).parent / "pictures"
UNPAINTED = """[...document.querySelectorAll('.tile canvas')].filter((each) => {
  const { top, bottom } = each.getBoundingClientRect();
  return each.width === 300 && top < innerHeight && bottom > 0;  // others are painted when they come near
}).length"""
PAIRS = "[...document.querySelectorAll('.pairs .tile canvas')].slice(0, 16).every((c) => c.width === 2 * c.height)"
SPIRE, DOME = (0.10, 0.10, 0.46, 0.48), (0.14, 0.10, 0.50, 0.48)  # left, top, right, bottom


def draw(address: str, scheme: str) -> None:
    with browser_page(address, scheme) as page:
        hand = Hand(page)
        page.request.put(f"{hand.base}/api/edit", data="{}")
        for rule in hand.state()["rules"]:
            page.request.delete(f"{hand.base}/api/rules/{rule['number']}")
        page.request.delete(f"{hand.base}/api/fit")
        page.reload()
        page.wait_for_selector("body[data-ready]")

        def taken(name: str) -> None:
            hand.wait("painted tiles", lambda: page.evaluate(UNPAINTED) == 0)
            page.wait_for_timeout(1000)
            page.screenshot(path=PICTURES / f"studio-{name}-{scheme}.png")

        hand.choose(6)
        hand.lasso(*SPIRE)
        taken("select")
        hand.use("copy")
        hand.choose(0)
        hand.lasso(*DOME)
        hand.use("paste")
        hand.settle(0)
        page.click("#find")
        page.wait_for_selector("#add-ten:visible")
        taken("matches")
        before = hand.painted()
        page.click("#add-ten")
        hand.settle(before)
        page.select_option("#order", "number")
        page.wait_for_selector(".verdict")
        page.check("#edited")
        taken("edit")
        page.click("#keep")
        page.wait_for_selector("#rules li")
        page.fill("#rules input[type=text]", "domes are spires")
        page.press("#rules input[type=text]", "Enter")
        page.click("#fresh")
        page.wait_for_selector("#rules-empty", state="hidden")
        page.select_option("#view", "side")
        hand.wait("pairs", lambda: page.evaluate(PAIRS))
        taken("rules")


with tempfile.TemporaryDirectory() as folder, studio(Path(folder)) as address:
    for scheme in ("light", "dark"):
        draw(address, scheme)
