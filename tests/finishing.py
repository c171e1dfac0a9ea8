"""What counts as working for a type of model, from pruning to generating; the first half is in tests/working.py."""

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from working import SMALL, TOKENS, apart, effects_of, examples, logits

from causalprune.checkpoints.saving import save
from causalprune.core.errors import ModelError, OptionError
from causalprune.core.types import Decoder, Effects
from causalprune.interventions.ablation import gated
from causalprune.interventions.units import sites
from causalprune.models.loading import load
from causalprune.pruning.layers import prune
from causalprune.pruning.methods import Method
from causalprune.shrinking.removal import Shares, shrink
from causalprune.shrinking.worth import Shrinking
from causalprune.streaming.files import Seen, check_streams, prune_stream

METHODS = (
    Method("magnitude", 0.5),
    Method("wanda", 0.5),
    Method("sparsegpt", 0.5),
    Method("wanda", 0.5, "2:4"),
    Method("cap", 0.5),
    Method("causal", 0.5, update="obs", budgets="uniform"),
)


def pruned(make: Callable[[], Decoder], method: Method, effects: Effects | None) -> Decoder:
    """(c) Prune a fresh model, and check that the sparsity is the one asked for, and that only prunable tensors differ."""
    decoder = make()
    before = {name: p.detach().clone() for name, p in decoder.model.named_parameters()}
    result = prune(
        decoder, method, calibration=examples(), effects=effects if "effects" in method.needs else None
    )
    count, zeros = 0, 0
    for p in decoder.projections:
        keep = result.keep[p.name]
        count, zeros = count + keep.numel(), zeros + int((~keep).sum())
        assert not bool(p.read()[~keep].any()), p.name
    slack = len(decoder.projections) + sum(p.shape[0] for p in decoder.projections) * (
        method.criterion == "wanda"
    )
    assert abs(zeros - method.sparsity * count) <= slack / 2, f"{method}: {zeros} of {count}"
    prunable = {p.parameter_name for p in decoder.projections}
    tied = getattr(decoder.model, "all_tied_weights_keys", None) or {}
    for name, p in decoder.model.named_parameters():
        if name not in prunable and tied.get(name) not in prunable:
            assert torch.equal(p, before[name]), f"{name} changed"
    return decoder


def pruning_is_exact(make: Callable[[], Decoder], methods: Sequence[Method] = METHODS) -> float:
    """(c) for every method."""
    effects = effects_of(make(), examples()) if any(layer.mixers for layer in make().layers) else None
    for method in methods:
        if method.criterion == "cap" and effects is None:
            continue
        if method.scope == "2:4" and any(p.shape[1] % 4 for p in make().projections):
            continue
        pruned(make, method, effects)
    return 0.0


def reloads(model: Any, auto: Any, folder: Path) -> float:
    """(d) A pruned folder loads with stock transformers to the same logits."""
    model.save_pretrained(folder / "source")
    decoder = load(str(folder / "source"))
    result = prune(decoder, Method("wanda", 0.5), calibration=examples())
    save(decoder, folder / "out", result)
    again = auto.from_pretrained(folder / "out", dtype=torch.float32).eval()
    error = apart(logits(again), logits(decoder.model))
    assert error <= 1e-6, f"the saved model differs by {error:.1e}"
    assert {n for n, _ in again.named_parameters()} == {n for n, _ in decoder.model.named_parameters()}
    return error


def streams(folder: Path, methods: Sequence[Method] = METHODS) -> float:
    """(e) Streamed and in memory are the same bytes, for every method that streams."""
    data = examples()
    for method in methods:
        if method.criterion == "cap":
            continue
        try:
            check_streams(method)
        except OptionError:
            continue
        decoder = load(str(folder / "source"))
        if method.scope == "2:4" and any(p.shape[1] % 4 for p in decoder.projections):
            continue
        name = f"{method.criterion}-{method.scope}".replace(":", "")
        save(decoder, folder / f"m-{name}", prune(decoder, method, calibration=data))
        prune_stream(folder / "source", folder / f"s-{name}", method, seen=Seen(data))
        own, other = _files(folder / f"m-{name}"), _files(folder / f"s-{name}")
        differ = sorted(n for n in own.keys() | other.keys() if own.get(n) != other.get(n))
        assert not differ, f"{method.criterion}: {differ}"
    return 0.0


def _files(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }
    found.pop("README.md", None)
    manifest = json.loads(found["causalprune.json"])
    manifest.pop("created")
    manifest["run"] = {k: v for k, v in manifest["run"].items() if k not in ("streamed", "size")}
    return found | {"causalprune.json": manifest}


def shrinks(make: Callable[[], Decoder], auto: Any, folder: Path) -> dict[str, str]:
    """(f) A standard configuration that loads with stock transformers, or why there is none, by kind of unit."""
    found = {}
    with contextlib.suppress(
        ModelError, OptionError
    ):  # whoever can go for a tenth of the parameters, or a line that says why not
        shrink(make(), 0.1, examples(), Shrinking(by="magnitude", update="none"))
    for kind, shares in {
        "neurons": Shares(neurons=0.5),
        "kv_groups": Shares(kv_groups=0.5),
        "layers": Shares(layers=0.4),
    }.items():
        try:
            result = shrink(make(), shares, examples(), Shrinking(by="magnitude", update="none"))
        except (ModelError, OptionError) as error:
            found[kind] = str(error)
            continue
        kept = getattr(result.kept, kind)
        if kind != "layers":
            base, place = make(), "heads" if kind == "kv_groups" else "mlp"
            gates = {}
            for site, n in sites(base).items():
                if site.place == place and site.layer in kept:
                    own = torch.zeros(n)
                    own[
                        (
                            kept[site.layer][:, None] * (n // _count(base, site.layer, kind))
                            + torch.arange(n // _count(base, site.layer, kind))
                        ).flatten()
                    ] = 1
                    gates[site] = own.expand(len(TOKENS), -1)
            with gated(base, gates):
                closed = logits(base.model)
            error = apart(logits(result.decoder.model), closed)
            assert error <= SMALL, f"shrunk {kind} is another model than one with closed units: {error:.1e}"
        save(result.decoder, folder / kind, result)
        again = auto.from_pretrained(folder / kind, dtype=torch.float32).eval()
        error = apart(logits(again), logits(result.decoder.model))
        assert error <= 1e-6, f"shrunk {kind}: {error:.1e}"
        found[kind] = "standard"
    return found


def _count(decoder: Decoder, layer: int, kind: str) -> int:
    own = decoder.layers[layer]
    return (
        own.attention.n_kv_heads
        if kind == "kv_groups"
        else next(p.shape[1] for p in own.projections if p.name == f"layers.{layer}.down")
    )


def generates(decoder: Decoder) -> float:
    """(g) Token by token, a cache changes nothing."""
    prompt, found = TOKENS[:1, :7], []
    for cached in (True, False):
        with torch.no_grad():
            out = decoder.model.generate(
                input_ids=prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=cached,
                output_logits=True, return_dict_in_generate=True, pad_token_id=0, attention_mask=torch.ones_like(prompt),
            )  # fmt: skip
        found.append(torch.stack(out.logits).double())
    error = apart(*found)
    assert error <= 1e-3, f"generation with a cache differs by {error:.1e}"
    return error


def kernels_agree(make: Callable[..., Decoder]) -> float | str:
    """Effects with eager attention and with sdpa agree; the largest difference in nats per token, or which of them does not run.

    Some attention of transformers' own does not, in a model that nothing was done to.
    """
    data = examples(2)
    for name in ("eager", "sdpa"):
        try:
            logits(make(attn_implementation=name).model)
        except RuntimeError as error:
            return f"{name} does not run in transformers alone: {error}"
        except ValueError:
            break
    try:
        found = [effects_of(make(attn_implementation=name), data).delta_nats() for name in ("eager", "sdpa")]
    except ValueError as error:
        if "does not support" in str(error):
            return 0.0
        raise
    error = float((found[0] - found[1]).abs().max())
    assert error <= SMALL, f"eager and sdpa differ by {error:.1e}"
    return error
