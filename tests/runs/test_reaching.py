"""How far a search for a file goes: shares that cannot meet a limit, or cannot pay, are not made."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from tinydata import tiny_decoder

from causalprune.core.sizes import size_of
from causalprune.core.types import EvalResult
from causalprune.runs import ModelSpec, reaching
from causalprune.shipping.frontier import Limit, Point


def test_a_model_that_is_too_far_behind_is_not_rounded() -> None:
    def result(value: float) -> EvalResult:
        return EvalResult("gsm8k_nll", "nats_per_token", (value,) * 4, (1.0,) * 4, ("a", "b", "c", "d"))

    whole, found = result(1.0), {0.1: result(1.1), 0.3: result(1.5)}
    points = [Point(0.0, "q8_0", 100)]
    for limit, far in (
        (Limit("size", 100), {0.3}),
        (Limit("size", 99), set()),
        (Limit("keep", 0.9), {0.3}),
    ):
        search = SimpleNamespace(
            asked=SimpleNamespace(limit=limit),
            dense=whole,
            rises=lambda _: {"q8_0": 0.09},
            keeps=lambda _: {"q8_0": 0.91},
            result=lambda share, _: found[share],
            shares=tuple(found),
            book=SimpleNamespace(rows={f"{share:g}/" for share in found}),
        )
        assert {share for share in found if reaching.enough(search, share, points)} == far


def test_what_a_share_costs_is_foreseen_on_the_line_through_the_last_two() -> None:
    def result(value: float) -> EvalResult:
        return EvalResult("gsm8k_nll", "nats_per_token", (value,) * 4, (1.0,) * 4, ("a", "b", "c", "d"))

    found = {0.1: result(1.02), 0.2: result(1.06)}
    search: Any = SimpleNamespace(dense=result(1.0), shares=(0.1, 0.2, 0.3, 0.4))
    search.result, search.book = lambda share, _: found[share], SimpleNamespace(rows=set())
    assert reaching.foreseen(search, 0.1) == 0.0  # nothing is known
    search.book.rows = {"0.1/"}
    assert reaching.foreseen(search, 0.2) == pytest.approx(0.04)
    search.book.rows = {"0.1/", "0.2/"}
    assert reaching.foreseen(search, 0.2) == pytest.approx(0.06)
    assert reaching.foreseen(search, 0.4) == pytest.approx(0.14)


def test_models_none_of_whose_files_can_be_small_enough_are_not_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = tiny_decoder()
    monkeypatch.setattr(reaching, "outlined", lambda _: decoder)
    inside = sum(p.size for p in decoder.projections) / size_of(decoder).parameters
    types = {"q8_0": {"bytes": 200, "fixed": 40}, "q2_k": {"bytes": 140, "fixed": 40}}
    said = list[str]()

    class Heard:
        def __call__(self, done: int, total: int) -> None: ...

        def say(self, note: str) -> None:
            said.append(note)

    @contextmanager
    def stage(name: str) -> Iterator[Any]:
        yield Heard()

    search: Any = SimpleNamespace(spec=ModelSpec("model"), start=SimpleNamespace(lacks=0.0))
    search.types, search.options = lambda _: types, SimpleNamespace(stage=stage)
    share = 0.5 * inside / reaching.ROUNDED  # half of what is in layers
    assert reaching.least_bytes(search, share) == pytest.approx(90)
    for limit, left_out in (
        (Limit("size", 89), True),
        (Limit("size", 91), False),
        (Limit("speed", 2), False),
    ):
        search.asked = SimpleNamespace(limit=limit)
        assert reaching.too_large(search, share) is left_out
    (note,) = said
    assert "left out: its smallest file has about 0 MB" in note
    search.asked, search.start.lacks = SimpleNamespace(limit=Limit("size", 89)), share  # it is there
    assert not reaching.too_large(search, share)
