from .answering import Written as Written
from .answering import room_for as room_for
from .continuing import (
    CONTINUATION as CONTINUATION,
)
from .continuing import (
    OPENING as OPENING,
)
from .continuing import (
    Begun as Begun,
)
from .continuing import (
    Judge as Judge,
)
from .continuing import (
    begin as begin,
)
from .continuing import (
    continued as continued,
)
from .continuing import (
    judge_of as judge_of,
)
from .intervals import Floats as Floats
from .intervals import bounds as bounds
from .intervals import bracketed as bracketed
from .intervals import room as room
from .measures import (
    check_tasks as check_tasks,
)
from .measures import (
    digests as digests,
)
from .measures import (
    evaluate as evaluate,
)
from .measures import (
    evaluation_contents as evaluation_contents,
)
from .measures import (
    goes_on as goes_on,
)
from .measures import (
    output_type as output_type,
)
from .measures import (
    same_as_before as same_as_before,
)
from .measures import (
    source_of as source_of,
)
from .pieces import Text as Text
from .pieces import version_of as version_of
from .results import (
    AT_CHANCE as AT_CHANCE,
)
from .results import (
    BINARY as BINARY,
)
from .results import (
    DRAWS as DRAWS,
)
from .results import (
    HIGHER_IS_BETTER as HIGHER_IS_BETTER,
)
from .results import (
    RESULTS as RESULTS,
)
from .results import (
    Row as Row,
)
from .results import (
    Tried as Tried,
)
from .results import (
    answered as answered,
)
from .results import (
    at_chance as at_chance,
)
from .results import (
    averaged as averaged,
)
from .results import (
    decoded as decoded,
)
from .results import (
    difference_of as difference_of,
)
from .results import (
    headline as headline,
)
from .results import (
    higher_is_better as higher_is_better,
)
from .results import (
    interval as interval,
)
from .results import (
    interval_of as interval_of,
)
from .results import (
    kept_rows as kept_rows,
)
from .results import (
    load_rows as load_rows,
)
from .results import (
    of_task as of_task,
)
from .results import (
    paired_difference as paired_difference,
)
from .results import (
    read_json as read_json,
)
from .results import (
    record_file as record_file,
)
from .results import (
    resampled as resampled,
)
from .results import (
    results_in as results_in,
)
from .results import (
    rows_of as rows_of,
)
from .results import (
    write_json as write_json,
)
from .results import (
    write_results as write_results,
)
from .results import (
    write_text as write_text,
)
from .sampling import ends_of as ends_of
from .settings import (
    Settings as Settings,
)
from .settings import (
    reader_for as reader_for,
)
from .tasks.generation import (
    alone as alone,
)
from .tasks.generation import (
    plain_generation as plain_generation,
)
from .tasks.repeating import TRAITS as TRAITS
from .tasks.repeating import (
    read_phrases as read_phrases,
)
from .tasks.repeating import (
    repeats as repeats,
)
from .tasks.repeating import (
    repetition as repetition,
)
from .tasks.repeating import (
    spans as spans,
)
from .tasks.scorers import is_taken as is_taken
from .tasks.scorers import load_scorers as load_scorers
from .written import (
    AND as AND,
)
from .written import (
    OWN_TASKS as OWN_TASKS,
)
from .written import (
    PIECE as PIECE,
)
from .written import (
    TOKENS as TOKENS,
)
from .written import (
    on_general_text as on_general_text,
)
from .written import (
    own_pieces as own_pieces,
)
from .written import (
    own_texts as own_texts,
)
from .written import (
    together as together,
)
