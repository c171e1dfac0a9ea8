from .behaviour import MEASURED as MEASURED
from .behaviour import Behaviour as Behaviour
from .behaviour import check_apart as check_apart
from .behaviour import sequences_of as sequences_of
from .checking import (
    RANDOM as RANDOM,
)
from .checking import (
    SAMPLE as SAMPLE,
)
from .checking import (
    Checks as Checks,
)
from .checking import (
    examined as examined,
)
from .curves import (
    Value as Value,
)
from .curves import (
    summed_up as summed_up,
)
from .finding import (
    GATES as GATES,
)
from .finding import (
    circuit as circuit,
)
from .overlaps import (
    OVERLAP as OVERLAP,
)
from .overlaps import (
    Overlap as Overlap,
)
from .overlaps import (
    check_overlap as check_overlap,
)
from .overlaps import (
    overlap as overlap,
)
from .records import (
    CIRCUIT as CIRCUIT,
)
from .records import (
    Circuit as Circuit,
)
from .records import (
    load_circuit as load_circuit,
)
from .records import (
    save_circuit as save_circuit,
)
from .telling import sentences as sentences
from .terms import (
    check_enough as check_enough,
)
from .terms import (
    check_search as check_search,
)
from .terms import (
    effect_for as effect_for,
)
from .terms import (
    turns as turns,
)
