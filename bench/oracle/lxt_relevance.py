"""Relevance by lxt (Clear BSD) of what every head and neuron sends, for `bench/circuits.py`: in an environment of its own.

    python3.11 -m venv .venv-lxt
    .venv-lxt/bin/python -m pip install "lxt==2.1" "transformers==4.52.4" "torch==2.13.0"
    .venv-lxt/bin/python -m pip uninstall -y torchvision timm open_clip_torch
    .venv-lxt/bin/python lxt_relevance.py MODEL_DIR TOKENS.json OUT.json

TOKENS.json is a list of {"tokens": [...], "targets": [positions of predicted tokens]}. OUT.json holds for each of them and each
layer the relevance of the heads and of the neurons, summed over positions, for the targets' logits less the mean logit.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from transformers import AutoConfig
from transformers.models.llama import modeling_llama  # noqa: F401 (before what stands for torchvision)
from transformers.models.qwen2 import modeling_qwen2  # noqa: F401

for missing in (
    "torchvision",
    "torchvision.models",
):  # lxt imports it for pictures, and its wheel wants another torch
    sys.modules.setdefault(missing, MagicMock())

from lxt.efficient import monkey_patch  # noqa: E402


def main(folder: str, tokens: str, output: str) -> None:
    """Write the relevance of all heads and neurons of a model."""
    config = AutoConfig.from_pretrained(folder)
    kind = config.model_type
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    monkey_patch(module, verbose=True)
    name = config.architectures[0]
    model = getattr(module, name).from_pretrained(folder, torch_dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.requires_grad = False
    seen: dict[tuple[int, str], torch.Tensor] = {}

    def keep(layer: int, place: str) -> Any:
        def hook(_: Any, args: Any) -> None:
            args[0].retain_grad()
            seen[layer, place] = args[0]

        return hook

    for number, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(keep(number, "heads"))
        layer.mlp.down_proj.register_forward_pre_hook(keep(number, "neurons"))
    found = []
    for one in json.loads(Path(tokens).read_text(encoding="utf-8")):
        ids = torch.tensor([one["tokens"]])
        embedded = model.get_input_embeddings()(ids).requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0]
        at = torch.tensor(one["targets"])
        (logits[at - 1, ids[0, at]] - logits[at - 1].mean(-1)).sum().backward()
        row: dict[str, list[list[float]]] = {"heads": [], "neurons": []}
        for number in range(len(model.model.layers)):
            for place, rows in row.items():
                x = seen[number, place]
                each = (x * x.grad).double().sum((0, 1))
                if place == "heads":
                    each = each.view(config.num_attention_heads, -1).sum(1)
                rows.append(each.tolist())
        found.append(row)
    Path(output).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:4])
