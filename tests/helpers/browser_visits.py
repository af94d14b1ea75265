"""A real browser on the page of the demo."""

import shutil
from typing import Any

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 720}}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
CURRENT = "() => document.querySelector('#rebuilt img') && !document.body.dataset.stale"
"""Whether the result on the page has the settings on the page."""
EXPLORED = """() => document.querySelector('#here img') && document.querySelector('#pyramid img')
    && !document.body.dataset.stalePlace && !document.body.dataset.staleFeatures"""
"""Whether the tab Explore shows what belongs to its controls."""
SHIFTS = """
    window.shift = 0;
    new PerformanceObserver(list => {
        for (const each of list.getEntries()) if (!each.hadRecentInput) window.shift += each.value;
    }).observe({type: 'layout-shift', buffered: true});"""


class Visit:
    """A page that notes what it asks for, what it complains of, and how far its content moved (`shift`).

    While it loads, its scripts run `slower` times as slowly, as on a phone.
    """

    def __init__(self, browser: Any, address: str, slower: int = 1, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        throttle = self.context.new_cdp_session(self.page)
        throttle.send("Emulation.setCPUThrottlingRate", {"rate": slower})
        self.page.set_default_timeout(60_000)
        self.page.add_init_script(SHIFTS)
        self.asked: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.goto(address)
        self.current()
        throttle.send("Emulation.setCPUThrottlingRate", {"rate": 1})

    def current(self) -> None:
        """Waits until the result is that of the settings."""
        self.page.wait_for_function(CURRENT)

    def outside(self, address: str) -> list[str]:
        return [url for url in self.asked if not url.startswith((address, "data:", "blob:"))]

    def number(self, name: str) -> str:
        return self.page.locator(f"#numbers .card:has(dt:text-is('{name}')) dd").inner_text()

    def choose(self, what: str, option: str) -> None:
        self.page.click(f"#{what} input")
        self.page.get_by_role("option", name=option).click()

    def open_tab(self, name: str) -> None:
        """Opens a tab, from the menu of those for which there is no place."""
        if self.page.get_by_role("tab", name=name).is_visible():
            self.page.get_by_role("tab", name=name).click()
        else:
            self.page.click("#tabs button[aria-label='More tabs']")
            self.page.locator("#tabs .overflow-dropdown button", has_text=name).click()

    def more(self) -> None:
        """Opens what is folded away."""
        self.page.click("#more > button")
        self.page.wait_for_selector("#views img")

    def until(self, condition: str) -> None:
        """Wait until `condition`, of the numbers' text, holds."""
        self.page.wait_for_function(
            "() => { const text = document.querySelector('#numbers')?.innerText ?? ''; "
            f"return {condition}; }}"
        )


def violations(page: Any) -> set[str]:
    """What axe-core finds serious or critical on the page, targets of touch included.

    Colours are those after the fading of what has just changed.
    """
    from axe_playwright_python.sync_playwright import Axe

    timing = "each.effect.getComputedTiming().iterations"
    moving = f"document.getAnimations().filter(each => each.playState == 'running' && {timing} < Infinity)"
    page.wait_for_function(f"() => {moving}.length == 0")
    answer = Axe().run(page, options={"rules": {"target-size": {"enabled": True}}}).response
    return {
        f"{each['id']}: {node['html'][:160]} {node['failureSummary'][:200]}"
        for each in answer["violations"]
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    }
