#!/usr/bin/env bash
# transformers 4 reads a configuration that transformers 5 has saved with another rotary base, and says nothing.
#
# Surprise: 5 writes the base and the scaling under `rope_parameters` alone. 4 looks for `rope_theta` and `rope_scaling` at the
#   top level, does not find them, and takes its defaults: base 10,000, no scaling. What it does not know it keeps as an
#   attribute that nothing reads. Weights load, and logits are another model's.
# Versions: transformers 5.23.0 (writes), transformers 4.57.6 (reads).
# Seen:
#   transformers 5.23.0 wrote: {'factor': 8.0, 'high_freq_factor': 4.0, 'low_freq_factor': 1.0, 'original_max_position_embeddings': 8192, 'rope_theta': 500000.0, 'rope_type': 'llama3'}
#   transformers 4.57.6 reads: base 10000.0, scaling None
# To users: for tools that stay on transformers 4 (optimum-onnx 0.1, say), write both places, or compare logits.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for package in transformers==5.23.0 transformers==4.57.6; do
    python3 -m venv "$folder/${package#*==}"
    "$folder/${package#*==}/bin/pip" install --quiet --disable-pip-version-check "$package"
done
export TRANSFORMERS_NO_ADVISORY_WARNINGS=1 HF_HUB_OFFLINE=1
"$folder/5.23.0/bin/python" - "$folder/model" <<'END'
import json
import sys
from pathlib import Path

import transformers

rotary = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
transformers.LlamaConfig(max_position_embeddings=131072, rope_parameters=rotary).save_pretrained(sys.argv[1])
wrote = json.loads((Path(sys.argv[1]) / "config.json").read_text())
print(f"transformers {transformers.__version__} wrote: {wrote.get('rope_parameters')}")
if wrote.get("rope_parameters") != rotary or "rope_theta" in wrote or "rope_scaling" in wrote:
    sys.exit("changed: what transformers 5 writes")
END
"$folder/4.57.6/bin/python" - "$folder/model" <<'END'
import sys

import transformers

found = transformers.AutoConfig.from_pretrained(sys.argv[1])
print(f"transformers {transformers.__version__} reads: base {found.rope_theta}, scaling {found.rope_scaling}")
if (found.rope_theta, found.rope_scaling) != (10000.0, None):
    sys.exit("changed: what transformers 4 reads")
END
