from .cells import load as load
from .cells import outlined as outlined
from .circuits import (
    CircuitSpec as CircuitSpec,
)
from .circuits import (
    find_circuit as find_circuit,
)
from .circuits import (
    overlap_circuits as overlap_circuits,
)
from .circuits import (
    planned_search as planned_search,
)
from .correcting import (
    correct_checkpoint as correct_checkpoint,
)
from .correcting import (
    planned_correction as planned_correction,
)
from .data import calibrate as calibrate
from .draws import (
    run_draws as run_draws,
)
from .draws import (
    times as times,
)
from .endings import (
    Outcome as Outcome,
)
from .endings import (
    next_command as next_command,
)
from .endings import (
    outcome as outcome,
)
from .endings import (
    outcome_of as outcome_of,
)
from .endings import (
    reading as reading,
)
from .fitting import check_trained as check_trained
from .fitting import place as place
from .fitting import room_of as room_of
from .looking import (
    Looked as Looked,
)
from .looking import (
    look as look,
)
from .plans import (
    Job as Job,
)
from .plans import (
    Plan as Plan,
)
from .plans import (
    plan as plan,
)
from .recipe import (
    AttributionSpec as AttributionSpec,
)
from .recipe import (
    CalibrationSpec as CalibrationSpec,
)
from .recipe import (
    ModelSpec as ModelSpec,
)
from .recipe import (
    Recipe as Recipe,
)
from .recipe import (
    find_recipe as find_recipe,
)
from .recipe import (
    preserving as preserving,
)
from .recipe import (
    read_recipe as read_recipe,
)
from .recipe import (
    without_limits as without_limits,
)
from .rows import (
    label as label,
)
from .rows import (
    parse_method as parse_method,
)
from .rows import writes_own as writes_own
from .searching import (
    Asked as Asked,
)
from .shipped import (
    fit as fit,
)
from .single import (
    Options as Options,
)
from .single import (
    attribute as attribute,
)
from .single import (
    check_stability as check_stability,
)
from .single import (
    evaluate_model as evaluate_model,
)
from .single import (
    prepared as prepared,
)
from .single import (
    prune_checkpoint as prune_checkpoint,
)
from .single import (
    prune_streamed as prune_streamed,
)
from .study import (
    run as run,
)
from .sweeping import (
    candidates as candidates,
)
from .sweeping import (
    sweep as sweep,
)
from .timing import (
    speeds as speeds,
)
from .undesired import CorrectionSpec as CorrectionSpec
