from .attribution import Estimator as Estimator
from .attribution import Question as Question
from .attribution import attribute as attribute
from .checkpoints import keep_sparsity as keep_sparsity
from .checkpoints import load as load
from .checkpoints import load_effects as load_effects
from .checkpoints import save as save
from .checkpoints import verify as verify
from .circuits import circuit as circuit
from .circuits import load_circuit as load_circuit
from .circuits import overlap as overlap
from .core import CausalPruneError as CausalPruneError
from .core import quiet as quiet
from .core import silent as silent
from .evaluation import evaluate as evaluate
from .evaluation import paired_difference as paired_difference
from .pruning import Method as Method
from .pruning import prune as prune
from .reports import compare as compare
from .reports import drawn as drawn
from .reports import report as report
from .runs import calibrate as calibrate
from .runs import run as run
from .runs import sweep as sweep
from .shrinking import Shares as Shares
from .shrinking import shrink as shrink

__version__: str
