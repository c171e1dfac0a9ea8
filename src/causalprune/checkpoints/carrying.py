"""Files of a model that are not weights: what goes along as it is, and what stays behind.

| what | goes along |
|---|---|
| files of the top folder and of `additional_chat_templates/` up to 50 MB | as they are: configuration, tokenizer, templates, processors, licence |
| `README.md` | as `README.base.md`: `README.md` is the card of the new model |
| Python files | where the user trusts the model's code |
| weights in any format, what a trainer knows, what causalprune found out about a model, hidden files, other folders | no |
"""

import json
import shutil
import warnings
from fnmatch import fnmatch
from pathlib import Path, PurePath

import huggingface_hub as hub

from causalprune.checkpoints.card import CARD
from causalprune.core import Decoder, Source
from causalprune.models import WEIGHTS, in_cache

MANIFEST, EFFECTS = "causalprune.json", "effects.json"
BASE_CARD, TEMPLATES, CONFIG = "README.base.md", "additional_chat_templates", "config.json"
LARGEST = 50 * 10**6
LEFT = [".*", "*.index.json", "optimizer*", "scheduler*", "rng_state*", "training_args*", "trainer_state*"]
LEFT += [
    "global_step*",
    "latest",
    "zero_to_fp32.py",
    "events.out.*",
    "adapter_*",
    MANIFEST,
    EFFECTS,
    "effects.values",
    "correction.json",
    "circuit.json",
    "report.html",
    "*.ledger",
]
USUAL = [CARD, "LICENSE", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"]
USUAL += [
    "special_tokens_map.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
]
"""Files that models have: where the Hub cannot be asked, those that the cache does not know of are named."""


def carry(decoder: Decoder, folder: Path) -> None:
    """Copy the files of a model's source that go along into a folder, where those that are there already stay.

    Warns of files that stay behind although a reader may miss them.
    """
    source = decoder.source
    if source is None or source.folder is None:
        return
    if source.hub:
        _fetch(decoder.name, source)
    home, left = source.folder, dict[str, str]()
    for path in sorted((*home.iterdir(), *home.glob(f"{TEMPLATES}/*"))):
        own = path.relative_to(home)
        target = folder / (own.with_name(BASE_CARD) if str(own) == CARD else own)
        if not goes_along(own) or not path.is_file() or target.exists():
            continue
        if (
            str(own) == CARD and (home / MANIFEST).exists()
        ):  # the card of a model of ours, which is not the base
            continue
        if why := _kept_back(path, source):
            left[str(own)] = why
            continue
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    if source.form is not None and (folder / CONFIG).exists():
        _say_unpacked(folder / CONFIG, source)
    if left:
        told = "; ".join(f"{own} ({why})" for own, why in left.items())
        warnings.warn(f"not copied from {home}: {told}", stacklevel=3)


def goes_along(path: PurePath) -> bool:
    """Tell whether a file of a model goes along by its name and place."""
    here = len(path.parts) == 1 or path.parts[:-1] == (TEMPLATES,)
    return here and path.suffix not in WEIGHTS and not any(fnmatch(path.name, left) for left in LEFT)


def _kept_back(path: Path, source: Source) -> str:
    """Return why a file that is there stays behind, empty if it does not."""
    home, target = path.parent if source.folder is None else source.folder.resolve(), path.resolve()
    if not target.is_relative_to(home) and not in_cache(home, target):
        return "a link to outside the model"
    if target.stat().st_size > LARGEST:
        return f"over {LARGEST / 1e6:.0f} MB"
    return "code, without --trust-remote-code" if path.suffix == ".py" and not source.code else ""


def _say_unpacked(path: Path, source: Source) -> None:
    """Say in a configuration that weights are not packed any more, and their dtype."""
    record = json.loads(path.read_text(encoding="utf-8"))
    record.pop("quantization_config", None)
    dtype = str(source.dtype).removeprefix("torch.")
    record |= {key: dtype for key in ("dtype", "torch_dtype") if key in record or key == "dtype"}
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _fetch(name: str, source: Source) -> None:
    """Fetch what the cache lacks of the files that go along; where the Hub cannot be reached, name what may be missing."""
    home, commit = Path(str(source.folder)), Path(str(source.folder)).name
    try:
        found = hub.HfApi().model_info(name, revision=commit, files_metadata=True).siblings or []
        for file in found:
            own = PurePath(file.rfilename)
            wanted = goes_along(own) and (file.size or 0) <= LARGEST and (source.code or own.suffix != ".py")
            if wanted and not (home / own).exists():
                hub.hf_hub_download(name, file.rfilename, revision=commit)
    except Exception as cause:
        absent = [own for own in USUAL if hub.try_to_load_from_cache(name, own, revision=commit) is None]
        if absent:
            warnings.warn(
                f"the Hub cannot be asked for files of {name} beside those in the cache ({type(cause).__name__}): if it "
                f"has {', '.join(absent)}, fetch and add them",
                stacklevel=4,
            )
