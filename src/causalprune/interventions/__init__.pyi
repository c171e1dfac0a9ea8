from .ablation import (
    InputCache as InputCache,
)
from .ablation import (
    LayerInputs as LayerInputs,
)
from .ablation import (
    capture as capture,
)
from .ablation import (
    entered_at as entered_at,
)
from .ablation import (
    gated as gated,
)
from .ablation import (
    last_hidden as last_hidden,
)
from .ablation import (
    on_cpu as on_cpu,
)
from .ablation import (
    replaced_forward as replaced_forward,
)
from .ablation import (
    run_layer as run_layer,
)
from .ablation import (
    site_inputs as site_inputs,
)
from .asked import (
    Asked as Asked,
)
from .asked import (
    Following as Following,
)
from .asked import (
    Losing as Losing,
)
from .asked import (
    drawn as drawn,
)
from .asked import (
    gate_slopes as gate_slopes,
)
from .asked import (
    likelihood as likelihood,
)
from .asked import (
    log_odds as log_odds,
)
from .asked import (
    odds as odds,
)
from .asked import (
    prominence as prominence,
)
from .carried import (
    shares as shares,
)
from .donors import (
    donated as donated,
)
from .donors import (
    means as means,
)
from .donors import (
    seen as seen,
)
from .donors import (
    shifted as shifted,
)
from .gradients import (
    expansion as expansion,
)
from .gradients import (
    neuron_effects as neuron_effects,
)
from .gradients import (
    output_slopes as output_slopes,
)
from .gradients import (
    uniforms as uniforms,
)
from .losses import (
    Targets as Targets,
)
from .losses import (
    by_row as by_row,
)
from .losses import (
    cross_entropy as cross_entropy,
)
from .losses import (
    divergence as divergence,
)
from .losses import (
    divergence_slope as divergence_slope,
)
from .losses import (
    lost as lost,
)
from .losses import (
    other_targets as other_targets,
)
from .losses import (
    parts_of as parts_of,
)
from .losses import (
    selected as selected,
)
from .losses import (
    target_logits as target_logits,
)
from .losses import (
    target_nats as target_nats,
)
from .losses import (
    targets as targets,
)
from .lrp import (
    check_ruled as check_ruled,
)
from .lrp import relevance as relevance
from .lrp import (
    ruled as ruled,
)
from .pieces import (
    Hold as Hold,
)
from .pieces import (
    Pieces as Pieces,
)
from .pieces import (
    Slopes as Slopes,
)
from .pieces import (
    as_they_are as as_they_are,
)
from .pieces import (
    differentiable as differentiable,
)
from .pieces import (
    entering as entering,
)
from .sensitivity import weight_slopes as weight_slopes
from .statistics import (
    InputNorms as InputNorms,
)
from .statistics import (
    Moments as Moments,
)
from .statistics import (
    See as See,
)
from .statistics import (
    observed as observed,
)
from .units import (
    Parts as Parts,
)
from .units import (
    Site as Site,
)
from .units import (
    closing as closing,
)
from .units import (
    gated_module as gated_module,
)
from .units import (
    gated_modules as gated_modules,
)
from .units import (
    grouped_by_effect as grouped_by_effect,
)
from .units import (
    list_units as list_units,
)
from .units import (
    sees_all as sees_all,
)
from .units import (
    sites as sites,
)
