from .compared import compare as compare
from .evidence import (
    CHECKPOINTS as CHECKPOINTS,
)
from .evidence import (
    LEDGER as LEDGER,
)
from .evidence import (
    achieved as achieved,
)
from .evidence import (
    measured as measured,
)
from .heatmaps import heatmap as heatmap
from .pictures import (
    drawn as drawn,
)
from .pictures import (
    paragraph as paragraph,
)
from .pictures import (
    verdict as verdict,
)
from .writing import (
    REPORT as REPORT,
)
from .writing import (
    report as report,
)
