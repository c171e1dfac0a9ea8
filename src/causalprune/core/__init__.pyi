from .anatomy import (
    Layer as Layer,
)
from .anatomy import (
    LeftOut as LeftOut,
)
from .anatomy import (
    Mixer as Mixer,
)
from .anatomy import (
    Place as Place,
)
from .anatomy import (
    Projection as Projection,
)
from .anatomy import (
    Role as Role,
)
from .bits import bands as bands
from .errors import (
    CausalPruneError as CausalPruneError,
)
from .errors import (
    CheckpointError as CheckpointError,
)
from .errors import (
    DataError as DataError,
)
from .errors import (
    MismatchError as MismatchError,
)
from .errors import (
    ModelError as ModelError,
)
from .errors import (
    OptionError as OptionError,
)
from .errors import (
    unknown as unknown,
)
from .ledger import (
    Ledger as Ledger,
)
from .ledger import (
    read_rows as read_rows,
)
from .ledger import (
    sync as sync,
)
from .memory import (
    AtOnce as AtOnce,
)
from .memory import (
    Made as Made,
)
from .memory import (
    Masks as Masks,
)
from .memory import (
    aligned as aligned,
)
from .memory import (
    free_bytes as free_bytes,
)
from .memory import (
    out_of_memory as out_of_memory,
)
from .memory import (
    packed as packed,
)
from .memory import (
    room as room,
)
from .memory import (
    unpacked as unpacked,
)
from .memory import (
    zeros_in as zeros_in,
)
from .places import (
    cache_folder as cache_folder,
)
from .places import (
    is_being_written as is_being_written,
)
from .progress import shown as shown
from .progress import (
    spoken as spoken,
)
from .provenance import (
    METHOD_VERSION as METHOD_VERSION,
)
from .provenance import (
    PACKAGES as PACKAGES,
)
from .provenance import (
    changes_since as changes_since,
)
from .provenance import (
    git_commit as git_commit,
)
from .provenance import (
    peak_bytes as peak_bytes,
)
from .provenance import (
    versions as versions,
)
from .resuming import (
    State as State,
)
from .resuming import (
    forget as forget,
)
from .resuming import (
    identity_at as identity_at,
)
from .resuming import (
    kept as kept,
)
from .showing import (
    Shown as Shown,
)
from .showing import (
    plain as plain,
)
from .sizes import (
    Size as Size,
)
from .sizes import (
    Speed as Speed,
)
from .sizes import (
    size_of as size_of,
)
from .source import (
    Source as Source,
)
from .types import (
    Batch as Batch,
)
from .types import (
    Calibration as Calibration,
)
from .types import (
    Decoder as Decoder,
)
from .types import (
    Effect as Effect,
)
from .types import (
    Effects as Effects,
)
from .types import (
    EvalResult as EvalResult,
)
from .types import (
    Example as Example,
)
from .types import (
    Progress as Progress,
)
from .types import (
    Remarked as Remarked,
)
from .types import (
    Stage as Stage,
)
from .types import (
    Unit as Unit,
)
from .types import (
    UnitKind as UnitKind,
)
from .types import (
    quiet as quiet,
)
from .types import (
    silent as silent,
)
from .waiting import (
    bar as bar,
)
from .waiting import (
    bars as bars,
)
from .words import say as say
