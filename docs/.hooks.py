"""For the site: links to files outside `docs/` become plain names, and the rows of the API page get signatures.

In the page as a file, `<!-- api: causalprune.pruning.layers.prune -->` after a table names what stands in it; the site shows
the whole signature and docstring there.
"""

import re
from typing import Any

API = re.compile(r"<!-- api: (\S+) -->")
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page as the site needs it."""
    return API.sub(r"\n::: \1\n", OUTSIDE.sub(r"`\1`", markdown))
