"""A whole study as one folder: recipes, plans, cells, sweeps, a model's own answers."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
