"""What a model consists of: layers of mixers and feed-forwards, and the matrices in them that can be pruned."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from causalprune.core.bits import bands, bits_of
from causalprune.core.errors import ModelError
from causalprune.core.showing import Shown

Role = Literal["q_a", "q_b", "kv_a", "kv_b", "q", "k", "v", "g", "o", "gate", "up", "down"]
"""What a matrix does. Of mixers: queries, keys, values (for state spaces C, B and x), the gate of what they send, output."""

Place = Literal["heads", "mixers", "mlp", "shared", "experts"]
"""Where a layer has gates: outputs of heads, of those of other mixers, MLP neurons, those of a shared expert, routed experts."""


@dataclass(frozen=True, eq=False, repr=False)
class Projection(Shown):
    """One prunable weight matrix, seen as `[out in]` however the model stores it.

    `parameter` is the stored tensor; `expert` picks one matrix of a 3-D stack, `transposed` says
    that the stored matrix is `[in out]` (GPT-2's Conv1D), `rows` picks the rows of a fused matrix
    that belong to this projection (None: all of them). An MLP without a gate has roles `up`, `down`. The rows (for `o` the
    columns) of a mixer's matrix are cut into as many equal `blocks` as it has heads or groups of heads, which own them in order;
    0: all heads share them. `uses` are further modules, in later layers, that share the parameter.
    """

    name: str
    layer: int
    role: Role
    parameter_name: str
    parameter: nn.Parameter
    module: nn.Module
    transposed: bool = False
    rows: slice | Int[Tensor, "out"] | None = None
    expert: int | None = None
    blocks: int = 0
    uses: tuple[nn.Module, ...] = ()

    def stored(self) -> Float[Tensor, "_ _"]:
        """Return the stored matrix that this one is in, as it is stored: shared, not copied."""
        return self.parameter.data if self.expert is None else self.parameter.data[self.expert]

    def read(self) -> Float[Tensor, "out in"]:
        """Return the matrix: a view of the stored weights, or a copy where `rows` is an index."""
        stored = self.stored().T if self.transposed else self.stored()
        return stored if self.rows is None else stored[self.rows]

    def write(self, weight: Float[Tensor, "out in"]) -> None:
        """Store `weight` in the model, in place, cast to the stored dtype."""
        stored = self.stored().T if self.transposed else self.stored()
        stored[slice(None) if self.rows is None else self.rows] = weight.to(stored)

    def erase(self, keep: Bool[Tensor, "out in"]) -> None:
        """Set weights to zero but where `keep` is True, in place.

        By multiplying the bits with 0 or 1, some rows at a time: ten times faster than a masked assignment.
        """
        weight = self.read()
        bits = bits_of(weight)
        for band in bands(weight):
            bits[band].mul_(keep[band])
        if isinstance(self.rows, Tensor):  # what was read is a copy
            self.write(weight)

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        out, into = self.parameter.shape[-2:][::-1] if self.transposed else self.parameter.shape[-2:]
        if isinstance(self.rows, slice):
            out = len(range(*self.rows.indices(out)))
        elif self.rows is not None:
            out = len(self.rows)
        return out, into

    @property
    def place(self) -> Place:
        """Where the units are that own rows or columns of it."""
        named: dict[str, Place] = {"mixer": "mixers", "shared": "shared", "experts": "experts"}
        return named.get(self.name.split(".")[2], "mlp" if self.role in ("gate", "up", "down") else "heads")

    @property
    def size(self) -> int:
        """Number of weights."""
        out, into = self.shape
        return out * into

    @property
    def device(self) -> torch.device:
        """Where `read` gives the matrix: the CPU, while it is on disk."""
        return torch.device("cpu") if self.parameter.is_meta else self.parameter.device


@dataclass(frozen=True, eq=False, repr=False)
class Mixer(Shown):
    """What mixes tokens in a layer: attention, whose units are `heads`, or a linear attention, state space or convolution (`mixers`).

    `output` is the module of its output projection, whose input is the concatenation of the units, `n_heads * head_dim` wide:
    heads, or groups of channels where there are none. The heads of `n_kv_heads` keys and values are shared by consecutive units.
    """

    place: Place
    module: nn.Module
    output: nn.Module
    n_heads: int
    n_kv_heads: int
    head_dim: int


@dataclass(frozen=True, eq=False, repr=False)
class Layer(Shown):
    """One decoder layer: its module, mixers and prunable projections, in a fixed order; it may lack mixers, or an MLP.

    `experts` is the module that holds a mixture of experts, None for a dense MLP.
    """

    index: int
    name: str
    module: nn.Module
    mixers: tuple[Mixer, ...]
    projections: tuple[Projection, ...]
    experts: nn.Module | None = None
    n_experts: int = 0

    def mixer(self, place: str) -> Mixer | None:
        """Return the mixer whose units are `heads` or `mixers`, if there is one."""
        return next((own for own in self.mixers if own.place == place), None)

    @property
    def attention(self) -> Mixer:
        """The attention, which most layers have.

        Raises:
            ModelError: this one has none.
        """
        if (own := self.mixer("heads")) is None:
            raise ModelError(f"{self.name} has no attention")
        return own

    @property
    def n_heads(self) -> int:
        """Number of attention heads, 0 where there is no attention."""
        own = self.mixer("heads")
        return own.n_heads if own else 0


@dataclass(frozen=True)
class LeftOut:
    """A parameter that is never pruned, and why."""

    parameter_name: str
    size: int
    reason: str
