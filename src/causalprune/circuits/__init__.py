"""Which units carry a behaviour: a ranking, the size that keeps it, what it is worth alone, and how sure that is."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
