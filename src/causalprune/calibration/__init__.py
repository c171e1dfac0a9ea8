"""From data to token batches: sources, templates, disjoint deterministic draws, what is a target."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
