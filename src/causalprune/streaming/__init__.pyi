from .files import (
    Seen as Seen,
)
from .files import (
    Streamed as Streamed,
)
from .files import (
    check_streams as check_streams,
)
from .files import copies_of as copies_of
from .files import (
    prune_stream as prune_stream,
)
from .files import (
    was_streamed as was_streamed,
)
