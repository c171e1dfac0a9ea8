from .correcting import correct as correct
from .records import (
    Contrast as Contrast,
)
from .records import (
    Corrected as Corrected,
)
