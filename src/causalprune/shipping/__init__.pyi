from .exporting import (
    SCRATCH as SCRATCH,
)
from .exporting import (
    Exporting as Exporting,
)
from .exporting import (
    check_export as check_export,
)
from .exporting import (
    export as export,
)
from .exporting import (
    plans as plans,
)
from .files import (
    Importance as Importance,
)
from .files import (
    Written as Written,
)
from .frontier import (
    NEAR as NEAR,
)
from .frontier import (
    Limit as Limit,
)
from .frontier import (
    Point as Point,
)
from .frontier import (
    best as best,
)
from .frontier import (
    bytes_of as bytes_of,
)
from .frontier import (
    can_keep as can_keep,
)
from .frontier import (
    front as front,
)
from .frontier import (
    half as half,
)
from .frontier import (
    kept as kept,
)
from .frontier import (
    kept_after as kept_after,
)
from .frontier import (
    limit_of as limit_of,
)
from .frontier import (
    pays_below as pays_below,
)
from .frontier import (
    worse as worse,
)
from .frontier import (
    worth_measuring as worth_measuring,
)
from .mixtures import MIXES as MIXES
from .recounting import (
    looked_into as looked_into,
)
from .recounting import (
    verify_file as verify_file,
)
from .rounding import rounded as rounded
from .runtime import running as running
from .weighing import (
    importance as importance,
)
from .weighing import (
    load_importance as load_importance,
)
from .weighing import (
    save_importance as save_importance,
)
