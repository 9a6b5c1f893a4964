"""Use the page in headless Chromium, and take pictures of it for a person to look at.

    python tests/page_screenshots.py FOLDER [CHROMIUM]

Needs `pip install playwright` and a Chromium. Fails where the page reports an error of its script
or breaks its own content policy.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

sys.path.insert(0, str(Path(__file__).parent))
from serving import running

PROMPT = "a red circle on a blue background"
SIZES = {"wide": (1280, 900), "narrow": (390, 844)}


def visit(page: Page, url: str, folder: Path, name: str) -> None:
    """Empty page, drawing, gallery, picture, compare, mask, error."""

    def shot(what: str) -> None:
        page.screenshot(path=folder / f"{name}-{what}.png", full_page=True)

    page.goto(url)
    page.wait_for_function("() => document.getElementById('model').options.length > 0")
    page.wait_for_timeout(300)
    shot("1-empty")
    page.fill("#prompt", PROMPT)
    page.fill("#seed", "7")
    page.fill("#steps", "60")
    page.fill("#count", "2")
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    page.fill("#prompt", "a green square on a yellow background")
    page.press("#prompt", "Control+Enter")
    page.wait_for_function("() => document.getElementById('preview').src", timeout=90_000)
    page.wait_for_timeout(600)
    shot("2-drawing")
    page.wait_for_function(
        "() => document.querySelectorAll('#gallery button').length >= 4", timeout=240_000
    )
    page.wait_for_timeout(500)
    shot("3-gallery")
    for index in (0, 3):
        page.locator("#gallery button").nth(index).click()
        page.wait_for_selector("#one[open]")
        if index == 0:
            page.wait_for_timeout(300)
            shot("4-picture")
        page.click("#mark")
    page.click("#compare")
    page.wait_for_selector("#two[open]")
    page.wait_for_timeout(300)
    shot("5-compare")
    page.keyboard.press("Escape")
    page.locator("#gallery button").nth(3).click()
    page.click("#use")
    assert page.input_value("#prompt") == PROMPT and page.input_value("#seed") == "7"
    page.locator("#gallery button").nth(3).click()
    page.click("#start")
    page.wait_for_selector("#ink")
    page.locator("#ink").scroll_into_view_if_needed()
    box = page.locator("#ink").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 60, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 160, box["y"] + 120, steps=5)
    page.mouse.up()
    page.fill("#prompt", "a green circle on a blue background")
    page.fill("#strength", "0.8")
    page.fill("#steps", "8")
    shot("6-mask")
    page.click("#draw")
    page.wait_for_function(
        "() => document.querySelectorAll('#gallery button').length >= 5", timeout=120_000
    )
    page.fill("#width", "65")
    page.evaluate("document.getElementById('form').noValidate = true")
    page.click("#draw")
    page.wait_for_function("() => document.getElementById('error').textContent", timeout=60_000)
    page.wait_for_timeout(300)
    shot("7-error")


def main(folder: Path, chromium: str) -> None:
    """Visit the page at both sizes, dark and light."""
    folder.mkdir(parents=True, exist_ok=True)
    faults: list[str] = []
    with sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for (name, size), scheme in zip(SIZES.items(), ("light", "dark"), strict=True):
            with tempfile.TemporaryDirectory() as gallery, running(Path(gallery)) as server:
                page = browser.new_page(
                    viewport={"width": size[0], "height": size[1]},
                    color_scheme=scheme,  # type: ignore[arg-type]
                )
                page.on("pageerror", lambda error: faults.append(str(error)))
                page.on(
                    "console",
                    lambda said: faults.append(said.text) if said.type == "error" else None,
                )
                visit(page, server.url, folder, name)
                page.close()
        browser.close()
    faults = [fault for fault in faults if "422" not in fault]
    assert not faults, faults


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "/usr/bin/chromium")
