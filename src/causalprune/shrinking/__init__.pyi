from .removal import (
    Shares as Shares,
)
from .removal import (
    leftovers as leftovers,
)
from .removal import (
    shares_for as shares_for,
)
from .removal import (
    shrink as shrink,
)
from .removal import (
    shrink_jobs as shrink_jobs,
)
from .worth import (
    Shrinking as Shrinking,
)
