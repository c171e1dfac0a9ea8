"""What runs measured, as one self-contained page, as figures, as JSON and CSV; no model is loaded."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
