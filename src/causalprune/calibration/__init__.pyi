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
    content_hash as content_hash,
)
from .data import (
    contents as contents,
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
from .examples import (
    FEW as FEW,
)
from .examples import (
    TRACE_END as TRACE_END,
)
from .examples import (
    TRACE_START as TRACE_START,
)
from .examples import (
    Chat as Chat,
)
from .examples import (
    Reader as Reader,
)
from .examples import (
    Skipped as Skipped,
)
from .examples import (
    Thinking as Thinking,
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
    check_tokenizer as check_tokenizer,
)
from .examples import (
    draw as draw,
)
from .examples import (
    encode as encode,
)
from .examples import (
    enough as enough,
)
from .examples import (
    few as few,
)
from .examples import (
    prompt_text as prompt_text,
)
from .examples import (
    prompt_tokens as prompt_tokens,
)
from .examples import (
    shuffle_key as shuffle_key,
)
from .examples import (
    split_counts as split_counts,
)
from .examples import (
    taken as taken,
)
from .examples import (
    text_tokens as text_tokens,
)
from .examples import (
    tokenize as tokenize,
)
from .examples import (
    uses_chat as uses_chat,
)
from .examples import (
    uses_thinking as uses_thinking,
)
from .examples import (
    windows as windows,
)
from .examples import (
    with_limit as with_limit,
)
