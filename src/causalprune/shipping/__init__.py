"""Checkpoints as files that ship: GGUF in the types of llama.cpp, and the file that fits a limit."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
