from .card import CARD as CARD
from .card import portable as portable
from .card import write_card as write_card
from .carrying import (
    EFFECTS as EFFECTS,
)
from .carrying import (
    MANIFEST as MANIFEST,
)
from .carrying import (
    carry as carry,
)
from .embedded import (
    EMBEDDED as EMBEDDED,
)
from .embedded import (
    load as load,
)
from .embedded import (
    resolve as resolve,
)
from .kept import (
    keep_sparsity as keep_sparsity,
)
from .kept import (
    reapply as reapply,
)
from .kept import (
    was_pruned as was_pruned,
)
from .placing import (
    check_destination as check_destination,
)
from .placing import (
    check_room as check_room,
)
from .placing import (
    complete as complete,
)
from .placing import (
    free_at as free_at,
)
from .saving import (
    KEEP as KEEP,
)
from .saving import (
    count as count,
)
from .saving import (
    count_zeros as count_zeros,
)
from .saving import (
    describe as describe,
)
from .saving import (
    hash_file as hash_file,
)
from .saving import (
    iterate_keep as iterate_keep,
)
from .saving import (
    keep_writer as keep_writer,
)
from .saving import (
    load_effects as load_effects,
)
from .saving import (
    read_manifest as read_manifest,
)
from .saving import (
    save as save,
)
from .saving import (
    save_effects as save_effects,
)
from .saving import (
    write_manifest as write_manifest,
)
from .sharing import (
    push as push,
)
from .sharing import (
    reserve as reserve,
)
from .verification import (
    Finding as Finding,
)
from .verification import (
    Verification as Verification,
)
from .verification import (
    verify as verify,
)
from .writing import (
    check_written as check_written,
)
from .writing import (
    round_as_written as round_as_written,
)
from .writing import (
    unknown_tensors as unknown_tensors,
)
from .writing import (
    warn_unpacked as warn_unpacked,
)
