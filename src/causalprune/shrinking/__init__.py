"""Units removed for good: a smaller standard model that every runtime loads."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
