"""Models on disk with what is known of them: save, read, recount, restore zeros, the card, the embedded model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
