#!/usr/bin/env bash
# transformers: a model read from a GGUF file is plain, and can neither be saved nor cast.
#
# Surprise: the documentation reads GGUF files "for further training", then calls `save_pretrained`. All weights are unpacked to
#   the dtype asked for, in ordinary layers, even if the file held float32; yet the model stays marked as quantised, and
#   `save_pretrained`, `float()` and `half()` raise, while `to(torch.bfloat16)` works.
# Versions: transformers 5.23.0, gguf 0.19.0, torch 2.13.0.
# Seen:
#   transformers 5.23.0, a Llama of float32 from a GGUF file
#   layers with weights: Embedding, Linear, LlamaRMSNorm; dtypes: torch.float32
#   save_pretrained: ValueError: The model is quantized with gguf and is not serializable
#   float: ValueError: `.float()` is not supported for quantized model
#   half: ValueError: `.half()` is not supported for quantized model
#   to(bfloat16): done
#   save_pretrained without the mark: done
# To users: take the mark away after loading (`hf_quantizer`, `config.quantization_config`), and the model saves as any other.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=critical TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
"$folder/env/bin/python" -W ignore - "$folder" <<'END'
import sys

import gguf
import numpy
import torch
import transformers

HIDDEN, WIDTH, HEADS, VOCABULARY = 32, 64, 4, 64
folder = sys.argv[1]
random = numpy.random.default_rng(0)
file = gguf.GGUFWriter(f"{folder}/model.gguf", "llama")
file.add_block_count(1)
file.add_context_length(64)
file.add_embedding_length(HIDDEN)
file.add_feed_forward_length(WIDTH)
file.add_head_count(HEADS)
file.add_head_count_kv(HEADS)
file.add_layer_norm_rms_eps(1e-5)
file.add_rope_dimension_count(HIDDEN // HEADS)
file.add_rope_freq_base(10000.0)
file.add_vocab_size(VOCABULARY)
shapes = {"token_embd": (VOCABULARY, HIDDEN), "output": (VOCABULARY, HIDDEN), "output_norm": (HIDDEN,)}
shapes |= {f"blk.0.attn_{name}": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")}
shapes |= {f"blk.0.{name}_norm": (HIDDEN,) for name in ("attn", "ffn")}
shapes |= {f"blk.0.ffn_{name}": (WIDTH, HIDDEN) for name in ("gate", "up")} | {"blk.0.ffn_down": (HIDDEN, WIDTH)}
for name, shape in shapes.items():
    file.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(numpy.float32))
file.write_header_to_file()
file.write_kv_data_to_file()
file.write_tensors_to_file()
file.close()

model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
kinds = {type(part).__name__ for part in model.modules() if next(part.parameters(recurse=False), None) is not None}
dtypes = {str(parameter.dtype) for parameter in model.parameters()}
print(f"transformers {transformers.__version__}, a Llama of float32 from a GGUF file")
print(f"layers with weights: {', '.join(sorted(kinds))}; dtypes: {', '.join(dtypes)}")
if kinds != {"Embedding", "Linear", "LlamaRMSNorm"} or dtypes != {"torch.float32"}:
    sys.exit("changed: the model is not a plain one")


def outcome(name, call):
    try:
        call()
        found = "done"
    except ValueError as error:
        found = f"ValueError: {str(error).split(' - ')[0].split('. ')[0]}"
    print(f"{name}: {found}")
    return found == "done"


done = [
    outcome("save_pretrained", lambda: model.save_pretrained(f"{folder}/first")),
    outcome("float", model.float),
    outcome("half", model.half),
    outcome("to(bfloat16)", lambda: model.to(torch.bfloat16)),
]
model.hf_quantizer = None
del model.config.quantization_config
done.append(outcome("save_pretrained without the mark", lambda: model.save_pretrained(f"{folder}/second")))
if done != [False, False, False, True, True]:
    sys.exit("changed: what a model from a GGUF file can do")
END
