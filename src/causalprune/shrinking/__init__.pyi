from .competing import (
    Budget as Budget,
)
from .competing import (
    Offers as Offers,
)
from .competing import (
    check_budget as check_budget,
)
from .removal import (
    Shares as Shares,
)
from .removal import (
    leftovers as leftovers,
)
from .removal import (
    looks as looks,
)
from .removal import (
    shrink as shrink,
)
from .removal import (
    shrink_jobs as shrink_jobs,
)
from .timing import (
    read_and_written as read_and_written,
)
from .together import step_of as step_of
from .worth import (
    Shrinking as Shrinking,
)
