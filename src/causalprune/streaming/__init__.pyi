from .copies import COPIES as COPIES
from .files import (
    Seen as Seen,
)
from .files import (
    Streamed as Streamed,
)
from .files import (
    check_streams as check_streams,
)
from .files import (
    prune_stream as prune_stream,
)
from .files import (
    was_streamed as was_streamed,
)
