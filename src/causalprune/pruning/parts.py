"""The parts of a pruning run, what each costs, and who is told how far it has come."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from causalprune.core import Batch, Decoder, Progress, kept, say, silent
from causalprune.pruning.criteria import TRAINS
from causalprune.pruning.methods import Method
from causalprune.pruning.obs import ITERATIONS
from causalprune.pruning.training import epochs

Costs = Mapping[str, Sequence[float]]
"""What the steps of every part cost, in passes of all calibration tokens through the model; in the order of the work."""

COLUMNS = 6.0
"""Times that going through a matrix column by column takes as long as a product of its size: it is small work in many pieces."""
LOGITS = 2.0
"""Times that logits, with what is made of them, take as long as the product that they are."""


def costs(
    decoder: Decoder, method: Method, groups: Sequence[Batch], few: Sequence[Batch], *, taught: bool
) -> Costs:
    """Return the cost of every part of a run on these batches, a few of which see graded interventions.

    Where they are `taught`, gradients have what training follows. Estimates, from the multiplications: for time left to show,
    not to bill.
    """
    n, pool, tokens = len(decoder.layers), decoder.projections, max(_tokens(groups), 1)
    size, head = sum(p.size for p in pool), decoder.model.get_output_embeddings()
    logits = LOGITS * (0 if head is None else head.weight.numel()) / size  # of all tokens, in passes
    some, targets = _tokens(few) / tokens, sum(int(b.is_target.sum()) for b in few) / tokens
    through = tokens * size  # multiplications of a pass
    product, update = sum(p.size * p.shape[1] for p in pool) / through, method.resolved_update
    gathers, trains = "moments" in method.needs, update in TRAINS
    moments = (
        tokens * sum(p.shape[1] ** 2 for p in pool if p.role in ("q", "kv_a", "o", "up", "down")) / through
    )
    found: dict[str, Sequence[float]] = {}
    if trains and not taught:
        found["predictions"] = [1.0]
    if method.gradient_passes:
        found["gradients"] = [method.gradient_passes + logits]
    own = (1 + gathers * (moments + COLUMNS * product * len(method.doses))) / n
    if method.trials:
        again = [some * left / n + targets * logits for left in range(n, 0, -1)]
        found["trials"] = [own + method.trials * passes for passes in again]
    if method.resolved_scope == "global" and method.walks > (update != "none"):
        found["scores"] = [own] * n
    solving = {"none": gathers * COLUMNS, "obs": COLUMNS}.get(update, gathers * COLUMNS + ITERATIONS)
    found["layers"] = [(2 + moments * (gathers or update != "none") + solving * product) / n] * n
    if trains:
        found["training"] = [epochs(tokens) * (3 + 2 * logits)]
    return found


def _tokens(groups: Sequence[Batch]) -> int:
    return sum(int(batch.lengths.sum()) for batch in groups)


def begun(path: Path) -> str:
    """Return what a stopped run has left at a path, in words; empty where that is nothing."""
    known = kept(path)
    lessons, squares, training = (known.get(name, {}) for name in ("lessons", "squares", "training"))
    predicted, batches = len(lessons.get("hidden", ())), lessons.get("batches", 0)
    layers, trained = sum(name.startswith("layer-") for name in known), "trained" in known
    pruned = trained or bool(training)
    each = training.get("batches", 1)
    steps, every = (
        training.get("epoch", 0) * each + training.get("steps", 0),
        training.get("epochs", 0) * each,
    )
    parts = [
        ("predictions", 0 < predicted == batches, f"{predicted} of {batches} batches of predictions"),
        (
            "gradients",
            "slopes" in known,
            f"{len(squares.get('sent', ()))} of {squares.get('of')} batches of gradients",
        ),
        ("trials", "trials" in known and (pruned or layers > 0), f"{len(known.get('trials', ()))} trials"),
        ("layers", pruned, f"{layers} of {known.get('layers')} layers"),
        ("training", trained, f"{steps} of {every} steps of training"),
    ]
    done = [part for part, over, _ in parts if over]
    words = [f"{' and '.join(', '.join(done).rsplit(', ', 1))} done"] if done else []
    return ", ".join(words + [text for _, over, text in parts if not over and not text.startswith("0 ")])


@dataclass(eq=False)
class Steps:
    """How far a run has come, part after part, and who is told. Without costs nobody is."""

    costs: Costs = field(default_factory=dict)
    on_progress: Progress = silent
    unit: str = ""
    _before: float = 0.0
    _part: Sequence[float] = ()

    def begin(self, part: str, unit: str) -> None:
        """Go on to a part, which is counted in such units."""
        if part not in self.costs:
            return
        at = list(self.costs).index(part)
        every = [sum(own) for own in self.costs.values()]
        self._before, self._part, self.unit = sum(every[:at]), self.costs[part], unit
        stop = _whole(sum(every[: at + 1]))
        if len(every) > 1:
            say(self.on_progress, part=f"{at + 1} of {len(every)}: {part}", stop=stop)

    def tell(self, done: int, total: int) -> None:
        """Report how many of the units of this part are done."""
        if not self._part:
            return
        whole, rest = divmod(done * len(self._part), total)
        share = sum(self._part[:whole]) + (self._part[whole] * rest / total if rest else 0.0)
        say(self.on_progress, count=f"{done:,} of {total:,} {self.unit}")
        self.on_progress(_whole(self._before + share), _whole(sum(map(sum, self.costs.values()))))


def _whole(passes: float) -> int:
    """Return thousandths of a pass, in which progress is reported."""
    return round(1000 * passes)
