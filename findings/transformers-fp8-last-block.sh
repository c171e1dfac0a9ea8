#!/usr/bin/env bash
# transformers: FP8 weights whose last block is cut short are unpacked with the wrong scales, and nothing is said.
#
# Surprise: a checkpoint states its blocks, `weight_block_size: [128, 128]`, and has a scale for each, the last of which may be cut short.
#   Unpacking (`FineGrainedFP8Config(dequantize=True)`, and on any machine without a fitting GPU) does not read the size: it divides the rows
#   and columns by the number of scales. 192 rows with two scales are taken for blocks of 96, so that 32 rows get the other block's scale.
#   Where rows are no multiple of the number of scales, as 577 with five, loading ends with an error.
# Versions: transformers 5.23.0, torch 2.13.0.
# Seen:
#   transformers 5.23.0, down_proj of 64 × 192 in blocks of 128 × 128: scales 1 × 2
#   columns 0 to 95: 0.000 of the largest weight apart; 96 to 127: 0.763; 128 to 191: 0.000
#   the same of 64 × 256: 0.000
# To users: unpack such a checkpoint by its `weight_block_size` (the scale of row i and column j is [i // 128, j // 128]) and load that.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=critical TQDM_DISABLE=1
"$folder/env/bin/python" -W ignore - "$folder" <<'END'
import json
import pathlib
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file

BLOCK, NAME = 128, "model.layers.0.mlp.down_proj.weight"


def apart(inner):
    """Return how far each column is from what was packed, as a share of the largest weight, and the shape of the scales."""
    own = pathlib.Path(sys.argv[1]) / str(inner)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(own)
    packed, wanted = {}, None
    for name, tensor in load_file(own / "model.safetensors").items():
        packed[name] = tensor
        if "_proj" not in name:
            continue
        weight = tensor.float()
        weight[:, BLOCK:] *= 0.1  # blocks of unlike sizes have unlike scales
        rows, columns = (-(-n // BLOCK) for n in weight.shape)
        scales = torch.stack(
            [
                torch.stack([part.abs().amax() / 448 for part in strip.split(BLOCK, 1)])
                for strip in weight.split(BLOCK, 0)
            ]
        )
        assert scales.shape == (rows, columns)
        each = scales.repeat_interleave(BLOCK, 0)[: len(weight)].repeat_interleave(BLOCK, 1)[:, : weight.shape[1]]
        codes = (weight / each).to(torch.float8_e4m3fn)
        packed |= {name: codes, f"{name}_scale_inv": scales}
        if name == NAME:
            wanted, shape = codes.float() * each, tuple(scales.shape)
    save_file(packed, own / "model.safetensors", {"format": "pt"})
    record = json.loads((own / "config.json").read_text())
    record["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]
    }  # fmt: skip
    (own / "config.json").write_text(json.dumps(record))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        own, dtype=torch.float32, quantization_config=transformers.FineGrainedFP8Config(dequantize=True)
    )
    found = dict(model.named_parameters())[NAME].detach().float()
    return ((found - wanted).abs() / wanted.abs().max()).amax(0), shape


columns, shape = apart(192)
print(f"transformers {transformers.__version__}, down_proj of 64 × 192 in blocks of 128 × 128: scales {shape[0]} × {shape[1]}")
parts = [float(part.max()) for part in (columns[:96], columns[96:128], columns[128:])]
print("columns 0 to 95: {:.3f} of the largest weight apart; 96 to 127: {:.3f}; 128 to 191: {:.3f}".format(*parts))
whole = float(apart(256)[0].max())
print(f"the same of 64 × 256: {whole:.3f}")
if parts[1] < 0.1 or max(parts[0], parts[2], whole) > 0.01:
    sys.exit("changed: a last block that is cut short is unpacked with its own scale, or others are not")
END
