"""Prune language models by what their parts are measured to do.

```python
decoder = load("embedded")
calibration = calibrate(decoder, ["gsm_symbolic"], n=6)
effects = attribute(decoder, calibration)
pruned = prune(decoder, Method("cap", sparsity=0.2), effects=effects)
save(decoder, "pruned", pruned)
```
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
