"""Sentences in which one of two people gets something from the other (Wang et al. 2022, arXiv 2211.00593), from templates of our own.

The counterfactual lets the other person act, so that the wrong answer is right there; it has the same words otherwise.
"""

import random
from collections.abc import Iterator

NAMES = "Adam Alex Anna Carl Emma Eric Jack Jane Jeff John Kate Kyle Luke Mark Mary Paul Rose Ruth Ryan Sean"
TEMPLATES = (
    "Then, {a} and {b} went to the {place}. At the end of the day, {s} gave a {thing} to",
    "When {a} and {b} met at the {place}, {s} handed a {thing} to",
    "After {a} and {b} had lunch at the {place}, {s} passed a {thing} to",
    "While {a} and {b} were working at the {place}, {s} offered a {thing} to",
    "Last week {a} and {b} walked to the {place}, where {s} lent a {thing} to",
    "Yesterday {a} and {b} had a long talk at the {place}. Later {s} sent a {thing} to",
)
PLACES = ("garden", "station", "library", "market", "school", "office", "museum", "hospital")
THINGS = ("ring", "book", "letter", "basket", "ticket", "drink", "picture", "key")
ROWS = 2000


def rows(seed: int) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield generated rows with the place they come from: `question`, `answer`, and what they are paired with."""
    names = NAMES.split()
    for number in range(seed, seed + ROWS):
        chance = random.Random(number)  # noqa: S311  # nosec B311 (no secret)
        given, actor = chance.sample(names, 2)
        pair = dict(zip("ab", chance.sample([given, actor], 2), strict=True))
        pair |= {"place": chance.choice(PLACES), "thing": chance.choice(THINGS)}
        template = chance.choice(TEMPLATES)
        yield (
            f"ioi seed {number}",
            {
                "question": template.format(**pair, s=actor),
                "answer": given,
                "counterfactual": template.format(**pair, s=given),
                "instead": f" {actor}",
            },
        )
