"""Keep zeros zero: while a pruned model is fine-tuned, and after weights were merged into it.

```python
callback = keep_sparsity(model, "pruned")
Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
# or in a loop of one's own, after every step of the optimizer:
optimizer.step()
callback()
```
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from causalprune.checkpoints.card import is_damped
from causalprune.checkpoints.saving import KEEP, iterate_keep, load_keep, read_manifest, save
from causalprune.core import CheckpointError, Decoder, MismatchError, Projection, zeros_in
from causalprune.models import load, outline, tokenizer_of

PRUNED = 0.01
"""Share of zeros from which a matrix was pruned before, and its zeros stay."""


class KeepSparsity(TrainerCallback):
    """Sets pruned weights back to zero after every step of the optimizer, or whenever it is called.

    Only the weights change, in place: momentum goes on, and is without effect on what is zero.
    """

    def __init__(self, projections: Sequence[Projection], keep: Mapping[str, Bool[Tensor, "_ _"]]) -> None:
        self._goes = [(p, ~keep[p.name]) for p in projections if p.name in keep]
        self.restored = self()
        """Weights that were not zero when this was made."""

    def __call__(self) -> int:
        """Set pruned weights to zero; return how many were not."""
        lost = 0
        with torch.no_grad():
            for i, (p, goes) in enumerate(self._goes):
                weight = p.read()
                here = goes.to(weight.device)  # the trainer may have moved the model
                self._goes[i] = p, here
                lost += int((weight[here] != 0).sum())
                p.write(weight.masked_fill(here, 0))
        return lost

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Follow the optimizer (called by `transformers.Trainer`)."""
        self()


def keep_sparsity(model: PreTrainedModel, folder: Path | str) -> KeepSparsity:
    """Return what keeps the zeros of a model that was loaded from `folder`, whose masks it reads.

    The model must be whole: what sharded training (FSDP, DeepSpeed stage 3) leaves on a device has other shapes.
    Adapters that are trained beside frozen weights change no zeros; merge them, and `reapply`.

    Raises:
        CheckpointError: the folder has no masks.
        MismatchError: the masks do not fit the model.
    """
    where = Path(folder)
    if not (where / KEEP).exists():
        raise CheckpointError(f"{where} has no {KEEP}: pass a folder that causalprune has written")
    keep = load_keep(where)
    projections = outline(model, None, name=str(where)).projections
    shapes = {p.name: p.shape for p in projections}
    for name, mask in keep.items():
        if shapes.get(name) != tuple(mask.shape):
            found = shapes.get(name, "absent")
            raise MismatchError(
                f"{name} is {found} in the model, and its mask in {where} is {tuple(mask.shape)}"
            )
    return KeepSparsity(projections, keep)


def was_pruned(decoder: Decoder) -> Callable[[Projection], bool]:
    """Return what tells of a matrix whether its zeros are to stay: where the checkpoint's masks say so, or a hundredth of it is zero."""
    file, masked = Path(decoder.name).expanduser() / KEEP, set[str]()
    if file.is_file():
        masked = {name for name, keep in iterate_keep(file) if not bool(keep.all())}
    return lambda p: p.name in masked or zeros_in(p.read()) >= PRUNED * p.size


def reapply(pruned: Path, model: Path, output: Path, *, overwrite: bool = False, **loading: Any) -> int:
    """Set the weights that are zero in `pruned` to zero in `model`, and save it as `output`; return how many were not.

    For a model into which adapters were merged, or that was fine-tuned without `keep_sparsity`. Where it has no tokenizer,
    it gets that of `pruned`. `loading` is what `load` takes.
    """
    if is_damped(read_manifest(pruned)["run"]):
        raise CheckpointError(
            f"{pruned} was corrected by scaling, which no mask of zeros repeats: correct {model} itself, without --damp or with it"
        )
    decoder = load(str(model), **{"device": "cpu", **loading})
    if decoder.tokenizer is None:
        decoder = replace(decoder, tokenizer=tokenizer_of(pruned))
    restored = keep_sparsity(decoder.model, pruned).restored
    told = {key: own for key, own in read_manifest(pruned)["run"].items() if key != "speed"}
    if corrected := told.get("correction"):  # whose numbers are of the other model
        told["correction"] = {key: own for key, own in corrected.items() if key != "sentences"}
    run = {**told, "reapplied": {"from": str(pruned), "to": str(model)}}
    save(decoder, output, manifest=run, keep=load_keep(pruned), overwrite=overwrite)
    return restored
