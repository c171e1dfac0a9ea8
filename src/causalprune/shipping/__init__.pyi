from .exporting import (
    Exporting as Exporting,
)
from .exporting import (
    check_export as check_export,
)
from .exporting import (
    export as export,
)
from .files import (
    Importance as Importance,
)
from .files import (
    Written as Written,
)
from .recounting import (
    looked_into as looked_into,
)
from .recounting import (
    verify_file as verify_file,
)
from .weighing import (
    importance as importance,
)
