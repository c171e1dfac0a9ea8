"""From effects and inputs to zeros (stages 2 and 3 of the method): the only writer of weights."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
