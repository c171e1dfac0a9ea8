"""What every wing speaks in: records, errors, ledgers, memory, progress, where results come from."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
