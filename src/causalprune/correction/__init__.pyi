from .behaviours import (
    CLEAN as CLEAN,
)
from .behaviours import (
    Judged as Judged,
)
from .behaviours import (
    check_shown as check_shown,
)
from .behaviours import (
    judged as judged,
)
from .behaviours import (
    sought as sought,
)
from .correcting import (
    check_contrast as check_contrast,
)
from .correcting import (
    check_parts as check_parts,
)
from .correcting import (
    correct as correct,
)
from .records import (
    CORRECTION as CORRECTION,
)
from .records import (
    Contrast as Contrast,
)
from .records import (
    Corrected as Corrected,
)
from .samples import (
    FEWEST as FEWEST,
)
from .samples import (
    halves as halves,
)
from .telling import (
    for_good as for_good,
)
from .telling import (
    sentences as sentences,
)
from .telling import (
    short as short,
)
