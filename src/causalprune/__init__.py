"""Prune language models by what their attention heads are measured to do.

```python
decoder = load("embedded")
calibration = calibrate(decoder.tokenizer, ["gsm_symbolic"], n=6)
effects = attribute(decoder, calibration)
pruned = prune(decoder, Method("cap", sparsity=0.2), effects=effects)
save(decoder, Path("pruned"), manifest={}, keep=pruned.keep, effects=effects)
```
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from causalprune.attribution import attribute
    from causalprune.calibration import calibrate
    from causalprune.checkpoint import load_effects, save
    from causalprune.embedded import load
    from causalprune.errors import CausalPruneError
    from causalprune.evaluation import evaluate
    from causalprune.kept import keep_sparsity
    from causalprune.methods import Method
    from causalprune.pruning import prune
    from causalprune.questions import Estimator, Question
    from causalprune.results import paired_difference
    from causalprune.verification import verify

__version__ = "0.1.0"

__all__ = [
    "CausalPruneError",
    "Estimator",
    "Method",
    "Question",
    "attribute",
    "calibrate",
    "evaluate",
    "keep_sparsity",
    "load",
    "load_effects",
    "paired_difference",
    "prune",
    "save",
    "verify",
]

_HOMES = {
    "CausalPruneError": "errors:CausalPruneError",
    "Estimator": "questions:Estimator",
    "Method": "methods:Method",
    "Question": "questions:Question",
    "attribute": "attribution:attribute",
    "calibrate": "calibration:calibrate",
    "evaluate": "evaluation:evaluate",
    "keep_sparsity": "kept:keep_sparsity",
    "load": "embedded:load",
    "load_effects": "checkpoint:load_effects",
    "paired_difference": "results:paired_difference",
    "prune": "pruning:prune",
    "save": "checkpoint:save",
    "verify": "verification:verify",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: `import causalprune` alone must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
