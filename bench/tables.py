"""Write the tables of README and docs from the result files: between `<!-- table: NAME -->` and `<!-- end -->`.

python bench/tables.py           # write
python bench/tables.py --check   # fail if a table is not what its result file says
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from common import RESULTS, ROOT

from causalprune.results import read_json, rows_of
from causalprune.tables import comparison, to_markdown

TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
LEFT_OUT = ("arc_challenge", "accuracy")
"""Options differ in length, so ARC-Challenge is usually reported by `acc_norm`."""
PAGES = ("README.md", "docs/*.md")


def core() -> str:
    """Dense and every method × sparsity × task, with paired intervals."""
    path = RESULTS / "core.json"
    rows = rows_of(read_json(path)["raw"]["table"]) if path.exists() else []
    if not rows:
        return "Not measured yet.\n"
    kept = [(label, [r for r in results if (r.task, r.metric) != LEFT_OUT]) for label, results in rows]
    return to_markdown(comparison(kept))


TABLES: dict[str, Callable[[], str]] = {"core": core}


def rewritten(text: str) -> str:
    """Return a page with its tables made anew."""
    return TABLE.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


def main() -> None:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    pages: list[Path] = sorted(page for pattern in PAGES for page in ROOT.glob(pattern))
    stale = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        if (new := rewritten(text)) != text:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(new, encoding="utf-8")
    print("\n".join(stale) or "all tables are as the result files say")
    sys.exit(bool(check and stale))


if __name__ == "__main__":
    main()
