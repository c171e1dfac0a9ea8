from .allocation import (
    Threshold as Threshold,
)
from .allocation import (
    break_ties as break_ties,
)
from .allocation import (
    prune_counts as prune_counts,
)
from .allocation import (
    threshold_of as threshold_of,
)
from .closing import (
    close as close,
)
from .closing import (
    dampen as dampen,
)
from .closing import (
    scale as scale,
)
from .closing import (
    scaled as scaled,
)
from .closing import (
    size_of_parts as size_of_parts,
)
from .closing import (
    staying as staying,
)
from .closing import (
    staying_weights as staying_weights,
)
from .closing import (
    still as still,
)
from .criteria import (
    BUDGETS as BUDGETS,
)
from .criteria import (
    CRITERIA as CRITERIA,
)
from .criteria import (
    SENSITIVE as SENSITIVE,
)
from .criteria import (
    TRAINS as TRAINS,
)
from .criteria import (
    UPDATES as UPDATES,
)
from .criteria import (
    Evidence as Evidence,
)
from .criteria import (
    Update as Update,
)
from .importance import (
    Factors as Factors,
)
from .importance import cap_units as cap_units
from .importance import (
    head_factors as head_factors,
)
from .importance import (
    head_importance as head_importance,
)
from .layers import (
    Repair as Repair,
)
from .layers import (
    carry_out as carry_out,
)
from .layers import (
    prune as prune,
)
from .layers import (
    prune_layers as prune_layers,
)
from .layers import (
    remove as remove,
)
from .methods import (
    N_OF_M as N_OF_M,
)
from .methods import (
    Method as Method,
)
from .methods import (
    pattern_sparsity as pattern_sparsity,
)
from .parts import (
    Steps as Steps,
)
from .parts import (
    begun as begun,
)
from .pruned import (
    Pruned as Pruned,
)
from .pruned import (
    manifest as manifest,
)
from .rules import (
    RULES as RULES,
)
from .training import (
    Lesson as Lesson,
)
from .training import (
    Training as Training,
)
from .training import (
    check_dtype as check_dtype,
)
from .training import (
    check_dtypes as check_dtypes,
)
from .training import (
    distill as distill,
)
from .training import (
    epochs as epochs,
)
from .training import (
    lessons as lessons,
)
from .walks import (
    Gathered as Gathered,
)
from .walks import (
    Plan as Plan,
)
from .walks import (
    planned as planned,
)
from .walks import (
    unrouted as unrouted,
)
