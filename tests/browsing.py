"""A page in a real browser without a window: what it logs, asks for, shows on hover, and how accessible it is."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SERIOUS = ("serious", "critical")


def chromium() -> str | None:
    """Return the path of a Chromium on this machine."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Seen:
    """What a page did: lines on the console that are warnings or worse, and addresses that it asked for."""

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    @property
    def drawn_ms(self) -> float:
        """Milliseconds from the start of loading until the last figure was there."""
        return float(self.page.evaluate("Number(document.documentElement.dataset.drawn)"))

    @property
    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return int(
            self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        )

    def serious(self) -> list[str]:
        """Return the serious findings of an axe scan of the page as it is now."""
        from axe_playwright_python.sync_playwright import Axe

        found = Axe().run(self.page).response["violations"]
        return [f"{own['id']}: {own['nodes'][0]['html'][:200]}" for own in found if own["impact"] in SERIOUS]

    def hover(self, kind: str, layer: int, column: int) -> str:
        """Return what the heatmap of a kind of parts shows under the mouse at a cell."""
        place = self.page.evaluate(
            """([kind, layer, column]) => {
              const plot = document.querySelector(`[data-kind="${kind}"]`);
              plot.scrollIntoView({block: "center", behavior: "instant"});
              const box = plot.querySelector(".nsewdrag").getBoundingClientRect();
              const {xaxis, yaxis} = plot._fullLayout;
              return [box.left + xaxis.c2p(column), box.top + yaxis.c2p(layer)];
            }""",
            [kind, layer, column],
        )
        self.page.mouse.move(place[0] - 3, place[1] - 1)
        self.page.mouse.move(*place)
        shown = self.page.locator(f'[data-kind="{kind}"] .hoverlayer .hovertext')
        shown = shown.filter(has_text=f"layer {layer},")  # that of another cell may still be there
        shown.first.wait_for(timeout=5000)
        return "\n".join(
            shown.first.locator("tspan.line").all_text_contents() or shown.first.all_text_contents()
        )


@contextmanager
def browser() -> Iterator[Any]:
    """Start a browser, or skip the test where there is none."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: `make browser`"
    )
    path = chromium() or pytest.skip(f"no {NAMES[0]} on this machine")
    with playwright.sync_playwright() as engine:
        own = engine.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield own
        finally:
            own.close()


@contextmanager
def opened(own: Any, file: Path, *, width: int = 1600, scheme: str = "light") -> Iterator[Seen]:
    """Open a file in a window of this width, and wait until its figures are drawn."""
    page = own.new_page(viewport={"width": width, "height": 1000}, color_scheme=scheme)
    seen = Seen(page)
    page.on("console", lambda m: seen.errors.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    page.on("dialog", lambda dialog: (seen.errors.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: seen.requests.append(request.url))
    try:
        page.goto(file.absolute().as_uri())
        page.wait_for_selector("html[data-drawn]", state="attached", timeout=60_000)
        seen.requests.remove(file.absolute().as_uri())
        yield seen
    finally:
        page.close()
