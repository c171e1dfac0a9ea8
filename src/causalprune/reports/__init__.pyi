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
from .frontiers import (
    FRONTIER_PAGE as FRONTIER_PAGE,
)
from .frontiers import (
    found as found,
)
from .frontiers import (
    frontier_page as frontier_page,
)
from .heatmaps import heatmap as heatmap
from .judging import (
    QUANTISED_ZEROS as QUANTISED_ZEROS,
)
from .judging import (
    RELIABLE_FROM as RELIABLE_FROM,
)
from .judging import (
    SPEED_OF_ZEROS as SPEED_OF_ZEROS,
)
from .judging import (
    Verdict as Verdict,
)
from .judging import (
    reliability_word as reliability_word,
)
from .pictures import (
    drawn as drawn,
)
from .pictures import (
    paragraph as paragraph,
)
from .summary import (
    verdict as verdict,
)
from .writing import (
    REPORT as REPORT,
)
from .writing import (
    report as report,
)
