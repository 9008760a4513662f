"""Write the README's picture of the page: ``python -m tests.browser.picture`` -> ``page.webp``."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from service.artefact import voc
from service.settings import DEFAULT_MODEL
from tests.browser.actions import CAT, DESKTOP, ask_mask, expect_result, inside_of, move_over
from tests.clients import serving

PICTURE = Path(__file__).with_name("page.webp")


def main() -> None:
    """Show the cat at desktop size in light colours, with the pointer over it."""
    with serving(DEFAULT_MODEL, threads=2) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(base_url=server.url, viewport=DESKTOP, device_scale_factor=1.5)
        page.goto("/")
        page.get_by_role("button", name="Cat").click()
        expect_result(page, CAT.name, (451, 300))
        mask = ask_mask(server, CAT.read_bytes())
        move_over(page, *inside_of(mask, voc.CLASSES.index("cat")))
        with Image.open(io.BytesIO(page.screenshot())) as image:
            image.save(PICTURE, "WEBP", quality=80, method=6)
        browser.close()
    print(f"{PICTURE}: {PICTURE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
