"""For the site: links to files of the repository outside `docs/` become plain names, as the site does not have them."""

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page without links that lead out of the site."""
    return OUTSIDE.sub(r"`\1`", markdown)
