"""How much the loss rises when a unit is removed (stage 1 of the method), and how far that can be trusted."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
