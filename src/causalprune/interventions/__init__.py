"""What touches a running model and leaves nothing behind: units, gates, losses, gradients, statistics."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
