"""Weights that pruning and training have changed, on disk until the checkpoint is written."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from causalprune.core import CheckpointError, Decoder, Layer, OptionError, State
from causalprune.streaming.residence import Residence

TURNS = "even", "odd"
COPIES = len(TURNS)
"""Copies of the prunable weights that are on disk while training goes on, at most."""


class Copies:
    """Layers as they are now: as pruning has left them, or as the last training step has.

    A step writes another copy than it reads, and only its end, in the `state`, says that the new one counts: a kill leaves
    a whole one.
    """

    def __init__(self, state: State, residence: Residence) -> None:
        self._state, self._residence, self._steps = state, residence, 0
        for name in [name for name in state.values if name.startswith(TURNS)]:
            del state.values[name]  # read when its layer runs
        residence.newer = self._newer

    @contextmanager
    def around(self, number: int) -> Iterator[Callable[[Layer], None]]:
        """Read layers as they were before a step, and write them as they are after it (an `Around`)."""
        self.settle(number - 1)
        if number > 1:
            self._state.drop(_name(0, layer) for layer in self._residence.decoder.layers)
        yield partial(self._moved, number)
        self._residence.release()

    def settle(self, steps: int) -> None:
        """Read layers from now on as they were after so many steps."""
        self._residence.release()
        self._steps = steps

    def _newer(self, layer: Layer) -> Mapping[str, Tensor]:
        name = _name(self._steps, layer)
        if self._state.path is None:
            return {}
        there = (self._state.path / name).exists()
        found = self._state.read(name) if there else {}
        if (
            found.get("step", 0) != self._steps
        ):  # as after a power cut: a step's files are not synced one by one
            raise CheckpointError(
                f"{self._state.path / name} is not of training step {self._steps}: delete {self._state.path} to begin again"
            )
        if not there:
            return {}
        return dict(zip(_parameters(layer), found["weights"], strict=True))

    def _moved(self, number: int, layer: Layer) -> None:
        self._state.pass_on(
            **{
                _name(number, layer): {
                    "weights": [p.data for p in _parameters(layer).values()],
                    "step": number,
                }
            },
        )


def check_unshared(decoder: Decoder) -> None:
    """Raise `OptionError` where layers share a matrix, which would have to be in two places at once."""
    places: dict[str, int] = {}
    for p in decoder.projections:
        if places.setdefault(p.parameter_name, p.layer) != p.layer:
            raise OptionError(
                f"{p.parameter_name} is shared by layers {places[p.parameter_name]} and {p.layer}: train it in memory, "
                "without --stream"
            )


def _parameters(layer: Layer) -> dict[str, Any]:
    """Return the parameters of prunable weights, each under the first of its names."""
    names = {p.parameter: p.parameter_name for p in reversed(layer.projections)}
    return {names[own]: own for own in dict.fromkeys(p.parameter for p in layer.projections)}


def _name(steps: int, layer: Layer) -> str:
    return f"{TURNS[steps % 2] if steps else 'layer'}-{layer.index}"
