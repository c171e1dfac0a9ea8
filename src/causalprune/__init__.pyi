from .attribution import Estimator as Estimator
from .attribution import Question as Question
from .attribution import attribute as attribute
from .calibration import calibrate as calibrate
from .checkpoints import keep_sparsity as keep_sparsity
from .checkpoints import load as load
from .checkpoints import load_effects as load_effects
from .checkpoints import save as save
from .checkpoints import verify as verify
from .core import CausalPruneError as CausalPruneError
from .evaluation import evaluate as evaluate
from .evaluation import paired_difference as paired_difference
from .pruning import Method as Method
from .pruning import prune as prune

__version__: str
