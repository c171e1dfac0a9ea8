#!/usr/bin/env bash
# safetensors: the same tensors with the same metadata give other bytes at every saving.
#
# Surprise: tensors are written in a fixed order, entries of `__metadata__` in that of a hash table, which is drawn anew for every
#   call. With two or more entries the file's hash differs from saving to saving, in one process too. (safetensors#584)
# Versions: safetensors 0.8.0.
# Seen (hashes and orders differ from run to run, more than one of each is what counts):
#   safetensors 0.8.0
#   no metadata: 32 savings, 1 different file
#   1 entry of metadata: 32 savings, 1 different file
#   6 entries of metadata: 32 savings, 32 different files
# To users: compare tensors, not hashes of files, or keep all that is to be said in one entry.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
"$folder/env/bin/python" - <<'END'
import sys

import numpy
import safetensors
from safetensors.numpy import save

SAVINGS = 32


def different(metadata):
    tensors = {"b": numpy.zeros((2, 2), numpy.float32), "a": numpy.ones(3, numpy.float16)}
    return len({save(tensors, metadata=metadata) for _ in range(SAVINGS)})


def files(count):
    return f"{SAVINGS} savings, {count} different file{'s' * (count > 1)}"


print("safetensors", safetensors.__version__)
none, one = different(None), different({"format": "pt"})
six = different({name: "1" for name in ("format", "source", "date", "method", "sparsity", "seed")})
print("no metadata:", files(none))
print("1 entry of metadata:", files(one))
print("6 entries of metadata:", files(six))
if none != 1 or one != 1:
    sys.exit("changed: files without an order of metadata differ too")
if six == 1:
    sys.exit("changed: the order of metadata is fixed")
END
