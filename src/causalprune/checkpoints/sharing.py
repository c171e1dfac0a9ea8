"""A checkpoint on the Hugging Face Hub: private unless said otherwise, and in place of nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub as hub

from causalprune.core import CheckpointError


def reserve(name: str, *, public: bool = False, overwrite: bool = False) -> str:
    """Make the repository for a checkpoint, before the long work, and return its whole name; an empty one that is there is taken.

    Raises:
        CheckpointError: there is no access, the repository holds files, or it is public (private) against what is asked for.
    """
    api = hub.HfApi()
    with _told(f"cannot make {name} on the Hub"):
        name = api.create_repo(name, private=not public, exist_ok=True).repo_id
        found = api.model_info(name)
    files = [file.rfilename for file in found.siblings or () if file.rfilename != ".gitattributes"]
    if files and not overwrite:
        raise CheckpointError(
            f"{name} exists on the Hub and holds {len(files)} files: choose another name, or pass --overwrite"
        )
    if bool(found.private) == public:
        now, way = ("private", "leave out") if public else ("public", "pass")
        raise CheckpointError(f"{name} is {now} on the Hub: {way} --public, or choose another name")
    return name


def push(folder: Path, name: str) -> str:
    """Upload a folder in place of all that the repository holds, as one commit; return its address."""
    api = hub.HfApi()
    again = f"{folder} is complete, and `hf upload {name} {folder}` tries again"
    with _told(f"cannot push to {name} ({again})"):
        api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="Made with causalprune", delete_patterns="*"
        )
    return f"{api.endpoint}/{name}"


@contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as cause:  # the hub client raises errors of three libraries
        raise CheckpointError(f"{what}: {' '.join(str(cause).split())[:300]}") from cause
