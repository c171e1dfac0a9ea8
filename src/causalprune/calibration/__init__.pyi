from .data import (
    OWN as OWN,
)
from .data import (
    OWN_TEXT as OWN_TEXT,
)
from .data import (
    SOURCES as SOURCES,
)
from .data import (
    TASK_FILES as TASK_FILES,
)
from .data import (
    TEXT_SOURCES as TEXT_SOURCES,
)
from .data import (
    Problem as Problem,
)
from .data import (
    Split as Split,
)
from .data import (
    check_path as check_path,
)
from .data import (
    content_hash as content_hash,
)
from .data import (
    contents as contents,
)
from .data import (
    digest as digest,
)
from .data import (
    is_file as is_file,
)
from .data import (
    load_problems as load_problems,
)
from .data import (
    load_texts as load_texts,
)
from .encoding import (
    Reader as Reader,
)
from .encoding import (
    Skipped as Skipped,
)
from .encoding import (
    Turns as Turns,
)
from .encoding import (
    apart as apart,
)
from .encoding import (
    encode as encode,
)
from .encoding import (
    question_text as question_text,
)
from .encoding import (
    question_tokens as question_tokens,
)
from .encoding import (
    text_tokens as text_tokens,
)
from .encoding import (
    tokenize as tokenize,
)
from .encoding import (
    windows as windows,
)
from .examples import (
    FEW as FEW,
)
from .examples import (
    Exclude as Exclude,
)
from .examples import (
    batch_of as batch_of,
)
from .examples import (
    batches as batches,
)
from .examples import (
    calibrate as calibrate,
)
from .examples import (
    check_positions as check_positions,
)
from .examples import (
    check_subsets as check_subsets,
)
from .examples import (
    described as described,
)
from .examples import (
    draw as draw,
)
from .examples import (
    drawn as drawn,
)
from .examples import (
    enough as enough,
)
from .examples import (
    few as few,
)
from .examples import (
    read as read,
)
from .examples import (
    shuffle_key as shuffle_key,
)
from .examples import (
    shuffled as shuffled,
)
from .examples import (
    split_counts as split_counts,
)
from .examples import (
    taken as taken,
)
from .examples import (
    usable as usable,
)
from .examples import (
    with_limit as with_limit,
)
from .templates import (
    DATE as DATE,
)
from .templates import (
    TRACE_END as TRACE_END,
)
from .templates import (
    TRACE_START as TRACE_START,
)
from .templates import (
    Chat as Chat,
)
from .templates import (
    Thinking as Thinking,
)
from .templates import (
    check_tokenizer as check_tokenizer,
)
from .templates import (
    date_of as date_of,
)
from .templates import (
    folded as folded,
)
from .templates import (
    on_date as on_date,
)
from .templates import (
    rendered as rendered,
)
from .templates import (
    seeded as seeded,
)
from .templates import (
    uses_chat as uses_chat,
)
from .templates import (
    uses_thinking as uses_thinking,
)
