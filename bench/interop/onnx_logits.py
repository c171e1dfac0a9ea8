"""Export a checkpoint to ONNX with optimum, and run it with onnxruntime on some tokens.

    python onnx_logits.py CHECKPOINT FOLDER TOKENS.json

writes `logits.npy` in FOLDER. Runs in the environment of onnx.txt.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime


def main(checkpoint: str, folder: str, tokens_file: str) -> None:
    """Export and run."""
    export = [Path(sys.executable).parent / "optimum-cli", "export", "onnx", "-m", checkpoint]
    subprocess.run([*export, "--task", "text-generation", folder], check=True, stdout=subprocess.DEVNULL)
    session = onnxruntime.InferenceSession(Path(folder) / "model.onnx")
    tokens = np.array([json.loads(Path(tokens_file).read_text())], dtype=np.int64)
    given = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    given["position_ids"] = np.arange(tokens.shape[1], dtype=np.int64)[None]
    names = {entry.name for entry in session.get_inputs()}
    (logits,) = session.run(["logits"], {name: value for name, value in given.items() if name in names})
    np.save(Path(folder) / "logits.npy", logits[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
