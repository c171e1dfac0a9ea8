"""From a name or a folder to a `Decoder`: loading, the anatomy of any decoder, weights as they lie in files."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
