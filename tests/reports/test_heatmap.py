"""Heatmaps of characters: every value is there, in every width, with and without colours."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Run
from reporting import made_effects

from causalprune.checkpoints.saving import save_effects
from causalprune.reports.evidence import Measured, measured
from causalprune.reports.heatmaps import MARGIN, heatmap


def made(layers: int = 3, heads: int = 5) -> Measured:
    return measured(made_effects(layers, heads, others=["mlp"]))[0]


def with_values(*values: float) -> Measured:
    own = made(1, 5)
    units = [unit | {"delta": value} for unit, value in zip(own.units, values, strict=True)]
    return replace(own, units=units)


@pytest.mark.parametrize("width", [8, 12, 40, 200])
@pytest.mark.parametrize("colour", [False, True])
def test_every_head_has_a_cell_and_no_line_is_too_wide(width: int, colour: bool) -> None:
    lines = [line for line in heatmap(made(), width=width, colour=colour) if "Δ" not in line.plain]
    assert all(line.cell_len <= width for line in lines)
    cells = sum((line.cell_len - MARGIN) // 2 for line in lines if line.plain[:MARGIN].strip())
    assert cells == 3 * 5 + 3


def test_digits_grow_with_the_effect_and_carry_its_sign() -> None:
    own = with_values(0.9, -0.5, 0.0, math.nan, 0.1, 7.0)
    line = [line.plain for line in heatmap(own, width=80, colour=False)][2]
    assert line.split() == ["0", "9-5", "0", "·", "1"]


def test_colours_tell_harm_from_help() -> None:
    own = with_values(0.9, -0.9, 0.01, -0.01, math.nan, 7.0)
    spans = {
        line.plain[s.start : s.end]: str(s.style)
        for line in heatmap(own, width=80, colour=True)
        for s in line.spans
        if "on" in str(s.style)
    }
    assert set(spans) == {"  ", "- "}
    styles = [
        str(s.style)
        for line in heatmap(own, width=80, colour=True)
        for s in line.spans
        if "on #" in str(s.style)
    ]
    assert len(set(styles)) == 4


def test_nothing_measured_is_said() -> None:
    own = with_values(*(math.nan,) * 6)
    assert [line.plain for line in heatmap(own, width=80, colour=True)] == [
        "head: nothing measured",
        "mlp: nothing measured",
    ]


def test_the_command_prints_folder_and_file(run: Run, tmp_path: Path) -> None:
    save_effects(made_effects(3, 5), tmp_path / "effects.json")
    code, out, err = run("effects", tmp_path)
    assert code == 0, err
    assert "head, Δ in nats per token" in out
    assert "most critical units" in out
    assert "\x1b[" not in out  # no terminal, no colours
    assert run("effects", tmp_path / "effects.json")[1] == out
    code, _, err = run("effects", tmp_path / "nowhere")
    assert code == 2
    assert "nowhere" in err
