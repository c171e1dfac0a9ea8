"""The report in a real browser: time, size, silence, accessibility, and runs that try to make it execute something.

    python bench/report.py             # needs Chromium and the extra `browser`
    python bench/report.py --picture   # the picture in the README, of the run that `bench/quality.py qwen` made

The run is made up: 1,024 heads, three methods at three sparsities on four tasks, 500 examples each.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, record, write_figures

sys.path.insert(0, str(ROOT / "tests"))
from browsing import browser, opened
from reporting import HOSTILE, write_run

from causalprune.evaluation.results import write_json
from causalprune.reports.writing import report

TASKS = {"gsm8k_cot": "accuracy", "strategyqa_cot": "accuracy", "own_nll": "nats_per_token"}
LARGE: dict[str, Any] = {"layers": 32, "heads": 32, "sparsities": (0.1, 0.2, 0.5), "n": 500}
LARGE["tasks"] = {**TASKS, "wikitext2_ppl": "perplexity"}
VIEWS = [(width, scheme) for width in (400, 1600) for scheme in ("light", "dark")]


def large(own: Any, folder: Path) -> dict[str, Any]:
    """Write the report of the large run and open it in every width and scheme."""
    run, page = write_run(folder / "large", **LARGE), folder / "large.html"
    command = [str(Path(sys.executable).parent / "causalprune"), "report", str(run), "-o", str(page)]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    whole = time.perf_counter() - start
    start = time.perf_counter()
    report([run], page)
    found: dict[str, Any] = {"write_seconds": time.perf_counter() - start, "command_seconds": whole}
    found |= {"html_bytes": page.stat().st_size, "errors": [], "requests": [], "axe": [], "drawn_ms": {}}
    for width, scheme in VIEWS:
        with opened(own, page, width=width, scheme=scheme) as seen:
            found["drawn_ms"][f"{scheme} {width}"] = seen.drawn_ms
            seen.page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
            found["axe"] += seen.serious()
            if seen.overflow:
                found["errors"].append(f"{seen.overflow} pixels too wide at {width}, {scheme}")
            found["errors"] += seen.errors
            found["requests"] += seen.requests
    return found


def hostile(own: Any, folder: Path) -> dict[str, list[str]]:
    """Open the report of every hostile run; return what each executed, asked for or logged."""
    found = {}
    for case, options in HOSTILE.items():
        page = folder / f"{case}.html"
        report([write_run(folder / case, **options)], page)
        with opened(own, page) as seen:
            done = [*seen.errors, *seen.requests]
            if (
                not seen.page.title().endswith(" · causalprune")
                or len(seen.page.query_selector_all("script")) != 3
            ):
                done.append(f"the page was changed: {seen.page.title()}")
            found[case] = done
    return found


def picture() -> None:
    """Write the first screen of a report on the table of the README to `docs/report.png`."""
    with tempfile.TemporaryDirectory() as scratch, browser() as own:
        run = Path(scratch) / "qwen"
        write_json(run / "results.json", record("quality")["raw"]["qwen"])
        report([run], Path(scratch) / "report.html")
        with opened(own, Path(scratch) / "report.html", width=1280) as seen:
            seen.page.screenshot(path=ROOT / "docs" / "report.png")


def main() -> None:
    """Measure, and write `results/report.json`, or make the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--picture", action="store_true")
    if parser.parse_args().picture:
        picture()
        return
    with tempfile.TemporaryDirectory() as scratch, browser() as own:
        big, attacked = large(own, Path(scratch)), hostile(own, Path(scratch))
        version = own.version
    figures: dict[str, float | None] = {
        "render_seconds": big["write_seconds"] + max(big["drawn_ms"].values()) / 1000,
        "html_mb": big["html_bytes"] / 1e6,
        "console_errors": len(big["errors"]),
        "network_requests": len(big["requests"]),
        "axe_serious": len(big["axe"]),
        "hostile_cases": len(attacked),
        "hostile_executed": sum(bool(done) for done in attacked.values()),
    }
    raw = {"large": big, "hostile": attacked, "browser": f"Chromium {version}"}
    print(write_figures("report", figures, raw, seeds=[0]), figures)


if __name__ == "__main__":
    main()
