"""`rewrite bench studio` runs, in its smallest form: it drags, draws, checks the pictures and keeps what it found."""

from __future__ import annotations

import json

import pytest

from rewrite_core.benchmarks import bench_studio


@pytest.mark.slow
def test_the_studio_is_measured(tmp_path, capsys, browser_is_there):
    assert bench_studio.main(tmp_path, quick=True) == 0, capsys.readouterr().err
    (file,) = tmp_path.glob("*.studio.quick.jsonl")
    (found,) = (json.loads(line) for line in file.read_text().splitlines())
    assert 0 < found["first picture"] <= found["24 pictures"] < 60 and found["releases"] == bench_studio.QUICK
    assert found["updates a second"] > 0 and found["error"] <= 1.01 / 255
    assert "slider drags" in capsys.readouterr().out


def test_a_slider_that_does_not_move_is_refused(browser_is_there):
    """The mouse is where the slider is not: no rate is told, least of all none."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_is_there, args=bench_studio.FLAGS)
        page = browser.new_page()
        page.set_content("<input id=strength type=range min=-1 max=2 step=0.05 value=1 disabled>")
        with pytest.raises(bench_studio.Refused, match="did not follow"):
            bench_studio.drags(bench_studio.Hand(page), 0.1)
        browser.close()
