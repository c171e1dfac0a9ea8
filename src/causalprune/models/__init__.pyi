from .anatomy import (
    dtype_in_memory as dtype_in_memory,
)
from .anatomy import (
    expert_weight as expert_weight,
)
from .anatomy import (
    fingerprint as fingerprint,
)
from .anatomy import (
    fingerprint_of as fingerprint_of,
)
from .anatomy import (
    frame_fingerprint as frame_fingerprint,
)
from .anatomy import (
    outline as outline,
)
from .anatomy import (
    reshaped as reshaped,
)
from .anatomy import (
    unfilled as unfilled,
)
from .classes import class_for as class_for
from .context import go_on as go_on
from .context import positions as positions
from .converting import (
    as_saved as as_saved,
)
from .folders import (
    FORMS as FORMS,
)
from .folders import (
    TOKENIZER_FILES as TOKENIZER_FILES,
)
from .folders import (
    WEIGHTS as WEIGHTS,
)
from .folders import (
    Stored as Stored,
)
from .folders import (
    auto_dtype as auto_dtype,
)
from .folders import (
    cached_dtype as cached_dtype,
)
from .folders import (
    check_folder as check_folder,
)
from .folders import (
    open_checkpoint as open_checkpoint,
)
from .folders import (
    stored_in as stored_in,
)
from .folders import (
    warn_left_over as warn_left_over,
)
from .loading import (
    check_options as check_options,
)
from .loading import (
    device_of as device_of,
)
from .loading import (
    load as load,
)
from .loading import (
    outlined as outlined,
)
from .loading import (
    read_shape as read_shape,
)
from .loading import (
    reading as reading,
)
from .loading import (
    skeleton as skeleton,
)
from .loading import (
    tokenizer_of as tokenizer_of,
)
from .loading import (
    wrapped as wrapped,
)
from .mistral import as_mistral as as_mistral
from .mixing import (
    setting as setting,
)
from .roles import (
    LEFT_OUT as LEFT_OUT,
)
from .shards import (
    Entry as Entry,
)
from .shards import (
    Made as Made,
)
from .shards import (
    ShardWriter as ShardWriter,
)
from .shards import (
    in_cache as in_cache,
)
from .shards import (
    layout as layout,
)
from .shards import (
    raw_bytes as raw_bytes,
)
from .summaries import (
    summary as summary,
)
