#!/usr/bin/env bash
# A grouped-query Unlimited-OCR of transformers runs with sdpa and does not run with eager attention.
#
# Surprise: its eager attention multiplies queries and keys as they are, and does not repeat the keys of a group for each of the
#   group's heads, as those of other families do (`repeat_kv`, which stands in the same file, is called nowhere). Where there are
#   fewer key-value heads than heads, shapes do not fit. sdpa is told that heads are grouped, and runs.
# Versions: transformers 5.23.0, torch 2.13.0.
# Seen:
#   transformers 5.23.0, 4 heads, 2 key-value heads: sdpa runs
#   transformers 5.23.0, 4 heads, 2 key-value heads: eager: RuntimeError: The size of tensor a (4) must match the size of tensor b (2) at non-singleton dimension 1
#   transformers 5.23.0, 4 heads, 4 key-value heads: sdpa runs
#   transformers 5.23.0, 4 heads, 4 key-value heads: eager runs
# To users: `--attention sdpa` (the default). What needs attention weights, which eager alone returns, cannot have them there.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 torch==2.13.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'END'
import sys

import torch
import transformers
from transformers.models.unlimited_ocr import modeling_unlimited_ocr as module

config_class = transformers.AutoConfig.for_model("unlimited_ocr").get_text_config().__class__
seen = {}
for groups in (2, 4):
    for attention in ("sdpa", "eager"):
        torch.manual_seed(0)
        config = config_class(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=16,
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=groups,
        )
        config._attn_implementation = attention
        model = module.UnlimitedOcrTextModel(config).eval()
        try:
            with torch.no_grad():
                model(input_ids=torch.arange(5)[None])
            seen[groups, attention] = "runs"
        except RuntimeError as error:
            seen[groups, attention] = f"RuntimeError: {error}"
        said = seen[groups, attention]
        between = " " if said == "runs" else ": "
        print(f"transformers {transformers.__version__}, 4 heads, {groups} key-value heads: {attention}{between}{said}")
others = {own: said for own, said in seen.items() if own != (2, "eager")}
if set(others.values()) != {"runs"} or "must match the size" not in seen[2, "eager"]:
    sys.exit("changed: which attention runs")
END
