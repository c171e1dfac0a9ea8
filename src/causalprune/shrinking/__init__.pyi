from .removal import (
    Shares as Shares,
)
from .removal import (
    Shrinking as Shrinking,
)
from .removal import (
    leftovers as leftovers,
)
from .removal import (
    record_of as record_of,
)
from .removal import (
    save_shrunk as save_shrunk,
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
