"""What a model is worth: tasks, losses, perplexity, and paired differences with intervals."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
