"""Takes the pictures of the demo's guide in a Chromium: laptop and phone, light and dark, and Explore.

python benchmarks/demo_screens.py tiny-64 --out docs
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from demo.commands.demo import load_models, serve

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
from browser_visits import CHROMIUM, DESKTOP, EXPLORED, PHONE, Visit

SCREENS: dict[str, dict[str, Any]] = {
    "demo": DESKTOP,
    "demo-dark": {**DESKTOP, "color_scheme": "dark"},
    "demo-phone": PHONE,
    "demo-phone-dark": {**PHONE, "color_scheme": "dark"},
}


def main() -> None:
    """Serves the models and writes a PNG for each screen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="the first one is shown")
    parser.add_argument("--out", required=True, type=Path, help="folder of the pictures")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page = serve(load_models(tuple(given.models), "cpu"), Path(folder))
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        for name, options in SCREENS.items():
            visit = Visit(browser, page.local_url, **options)
            visit.page.wait_for_timeout(500)  # a scrollbar fades
            visit.page.screenshot(path=given.out / f"{name}.png")
            visit.context.close()
        visit = Visit(browser, page.local_url, **DESKTOP)
        visit.page.get_by_role("tab", name="Explore").click()
        visit.page.wait_for_function(EXPLORED)
        visit.page.mouse.move(0, 0)
        visit.page.wait_for_timeout(500)
        visit.page.screenshot(path=given.out / "demo-explore.png", full_page=True)
        browser.close()
        page.close(verbose=False)


if __name__ == "__main__":
    main()
