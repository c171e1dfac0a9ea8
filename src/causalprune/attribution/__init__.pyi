from .cluster import (
    Cluster as Cluster,
)
from .cluster import (
    fill as fill,
)
from .estimators import LEAST as LEAST
from .estimators import attribute as attribute
from .estimators import balanced as balanced
from .measuring import Passes as Passes
from .merging import merge as merge
from .plan import (
    Plan as Plan,
)
from .plan import (
    planned as planned,
)
from .questions import (
    DEFAULT_BUDGET as DEFAULT_BUDGET,
)
from .questions import (
    ELSEWHERE as ELSEWHERE,
)
from .questions import (
    UNPAIRED as UNPAIRED,
)
from .questions import (
    Ablation as Ablation,
)
from .questions import (
    Estimator as Estimator,
)
from .questions import (
    Named as Named,
)
from .questions import (
    Question as Question,
)
from .questions import (
    check_together as check_together,
)
from .repeatability import (
    DRAWS as DRAWS,
)
from .repeatability import (
    Pairs as Pairs,
)
from .repeatability import (
    Trial as Trial,
)
from .repeatability import (
    stability as stability,
)
from .uncertainty import (
    described as described,
)
from .uncertainty import (
    estimate as estimate,
)
from .uncertainty import (
    reliability as reliability,
)
from .uncertainty import (
    scores as scores,
)
