"""Tiny checkpoints in every form that is published, and what becomes of each when it is written again."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from families import tiny
from ggufs import SCALED, factors, write_gguf
from safetensors.torch import load_file, save_file
from tinydata import TEMPLATE, byte_tokenizer
from torch import Tensor
from torch.nn.functional import pad
from transformers import GptOssConfig, LlamaConfig, PreTrainedModel, Qwen3MoeConfig

Tensors = dict[str, Tensor]
SHAPE: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
BLOCK = 128


@dataclass
class Made:
    """A checkpoint: what is passed as MODEL and with it, files that stay behind, and tensors where files hold others.

    `settings` are those that no configuration holds.
    """

    model: Path
    left: set[str] = field(default_factory=set)
    options: tuple[str, ...] = ()
    tensors: Tensors | None = None
    refused: str = ""
    streams: bool = True
    settings: dict[str, Any] = field(default_factory=dict)


def llama(**changes: Any) -> PreTrainedModel:
    """Return a tiny Llama in bfloat16."""
    return tiny(LlamaConfig(**SHAPE | changes)).to(torch.bfloat16)


def write(folder: Path, model: PreTrainedModel | None = None, **how: Any) -> Path:
    """Write a folder as transformers 4 did, with a tokenizer, a template, a card and a licence."""
    model = model or llama()
    model.config.dtype = model.dtype
    model.save_pretrained(folder, **how)
    edit(folder / "config.json", _older)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    plain = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(plain), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nThe base.\n", encoding="utf-8")
    (folder / "LICENSE").write_text("MIT\n", encoding="utf-8")
    return folder


def _older(record: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with what transformers 4 looks for."""
    scaling = dict(record["rope_parameters"])
    theta = scaling.pop("rope_theta")
    scaled = scaling.get("rope_type", "default") != "default"
    return record | {"rope_theta": theta} | ({"rope_scaling": scaling} if scaled else {})


def edit(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change a JSON file."""
    path.write_text(json.dumps(change(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")


def add(folder: Path, extra: Tensors) -> None:
    """Add tensors to the only weight file of a folder."""
    file = folder / "model.safetensors"
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})


def one_file(folder: Path) -> Made:
    return Made(write(folder))


def shards(folder: Path) -> Made:
    return Made(write(folder, max_shard_size="20KB"))


def stale_index(folder: Path) -> Made:
    write(folder)
    old = folder.with_name("old")
    llama(num_hidden_layers=3).save_pretrained(old, max_shard_size="20KB")
    names = {path.name for path in old.glob("model*")}
    for name in names:
        (old / name).rename(folder / name)
    return Made(folder, left=names)


def consolidated(folder: Path) -> Made:
    write(folder)
    save_file({"layers.0.wq.weight": torch.ones(4, 4)}, folder / "consolidated.safetensors")
    return Made(folder, left={"consolidated.safetensors"})


def pickled(folder: Path) -> Made:
    write(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    return Made(folder, options=("--allow-pickle",), tensors=tensors, streams=False)


def tied(folder: Path) -> Made:
    return Made(write(folder, llama(tie_word_embeddings=True)))


def untied(folder: Path) -> Made:
    write(folder)
    head = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    add(folder, {"lm_head.weight": head})  # as many as say that they are not tied
    return Made(folder)


def own_head(folder: Path) -> Made:
    write(folder, llama(tie_word_embeddings=True))
    add(folder, {"lm_head.weight": torch.randn(258, 32).bfloat16()})
    return Made(folder)


def more_tokens(folder: Path) -> Made:
    write(folder)
    names = ("model.layers.2.eh_proj.weight", "model.layers.2.enorm.weight", "mtp.0.fc.weight")
    add(folder, {name: torch.randn(32, 32) for name in names})
    return Made(folder)


def reward(folder: Path) -> Made:
    write(folder)
    edit(
        folder / "config.json",
        lambda record: record | {"architectures": ["LlamaForSequenceClassification"]},
    )
    add(folder, {"score.weight": torch.randn(1, 32).bfloat16()})
    return Made(folder, refused="LlamaForSequenceClassification")


def fp8(folder: Path, **changes: Any) -> Made:
    """Write projections as FP8 codes with a scale for every block of 128 by 128, of which the last may be cut short."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4} | changes
    write(folder, llama(**shape))
    packed, plain = Tensors(), load_file(folder / "model.safetensors")
    for name, weight in list(plain.items()):
        packed[name] = weight
        if "_proj" in name:
            out, into = weight.shape
            filled = pad(weight.float(), (0, -into % BLOCK, 0, -out % BLOCK))
            blocks = filled.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
            scale = blocks.abs().amax((1, 3)) / 448
            wide = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:out, :into]
            codes = (weight.float() / wide).to(torch.float8_e4m3fn)
            packed |= {name: codes, f"{name}_scale_inv": scale}
            plain[name] = (codes.float() * wide).bfloat16()
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    how = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    edit(folder / "config.json", lambda record: record | {"quantization_config": how})
    return Made(folder, tensors=plain)


def mxfp4(folder: Path) -> Made:
    """Write experts of a gpt-oss as codes of four bits with an exponent for every 32."""
    changes = {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = GptOssConfig(**SHAPE | changes | {"hidden_size": 64, "intermediate_size": 64})
    write(folder, tiny(config).to(torch.bfloat16))
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    packed, plain = Tensors(), load_file(folder / "model.safetensors")
    random = torch.Generator().manual_seed(0)
    for name, weight in list(plain.items()):
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            packed[name] = weight
            continue
        experts, into, out = weight.shape
        codes = torch.randint(0, 16, (experts, out, into), generator=random)
        exponents = torch.randint(118, 124, (experts, out, into // 32), generator=random)
        low, high = codes[..., 0::2], codes[..., 1::2]
        packed[f"{name}_blocks"] = (low | high << 4).to(torch.uint8).view(experts, out, into // 32, 16)
        packed[f"{name}_scales"] = exponents.to(torch.uint8)
        scale = torch.exp2((exponents - 127).float()).repeat_interleave(32, 2)
        plain[name] = (values[codes] * scale).transpose(1, 2).bfloat16().contiguous()
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    whole = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    how = {"quant_method": "mxfp4", "modules_to_not_convert": whole}
    edit(folder / "config.json", lambda record: record | {"quantization_config": how})
    return Made(folder, tensors=plain)


def half(folder: Path) -> Made:
    return Made(write(folder, llama().to(torch.float16)))


def gguf_file(folder: Path) -> Made:
    """Write a Llama whose rotary frequencies are scaled by a tensor, as Llama 3 has it."""
    folder.mkdir(parents=True)
    rope = {"rope_type": "llama3", "rope_theta": 500.0, **SCALED}
    changes = {
        "vocab_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
    }
    config = LlamaConfig(**SHAPE | changes, rope_parameters=rope)
    model = tiny(config)
    scaling = {"rope_freqs.weight": factors(16, 500.0, SCALED)}
    path = write_gguf(folder / "tiny.gguf", model, tensors=scaling, rope__dimension_count=16)
    held = {name: weight.detach() for name, weight in model.named_parameters()}
    return Made(path, left={path.name}, tensors=held, streams=False, settings={"rope_parameters": rope})


def sentencepiece(folder: Path) -> Made:
    write(folder)
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    edit(
        folder / "tokenizer_config.json",
        lambda record: record | {"add_bos_token": True, "add_eos_token": False, "legacy": False},
    )
    return Made(folder)


def two_templates(folder: Path) -> Made:
    write(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(TEMPLATE, encoding="utf-8")
    return Made(folder)


def processor(folder: Path) -> Made:
    write(folder)
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        (folder / name).write_text('{"size": 224}', encoding="utf-8")
    return Made(folder)


CODE = {
    "configuration_own.py": "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n",
    "modeling_own.py": "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
    "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n",
}


def own_code(folder: Path) -> Made:
    write(folder)
    for name, text in CODE.items():
        (folder / name).write_text(text, encoding="utf-8")
    places = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    own = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": places}
    edit(folder / "config.json", lambda record: record | own)
    return Made(folder, options=("--trust-remote-code",), streams=False)


def trainers(folder: Path) -> Made:
    write(folder)
    left = {
        "optimizer.pt",
        "scheduler.pt",
        "rng_state_0.pth",
        "training_args.bin",
        "trainer_state.json",
        "latest",
    }
    for name in left:
        (folder / name).write_text("{}", encoding="utf-8")
    deep = {"global_step10/states.pt", "original/params.json", "onnx/model.onnx", ".gitattributes"}
    for name in deep:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}", encoding="utf-8")
    return Made(folder, left=left | deep)


def mixture(folder: Path) -> Made:
    changes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    write(folder, tiny(Qwen3MoeConfig(**SHAPE | changes)).to(torch.bfloat16))
    edit(folder / "config.json", lambda record: record | {"num_experts": 4})  # the word of transformers 4
    return Made(folder)


SOURCES: dict[str, Callable[[Path], Made]] = {
    "one file": one_file,
    "shards": shards,
    "stale index": stale_index,
    "model + consolidated": consolidated,
    "pickle with consent": pickled,
    "tied": tied,
    "untied": untied,
    "tied with an own head": own_head,
    "extra tensors (MTP)": more_tokens,
    "reward head": reward,
    "FP8": fp8,
    "MXFP4": mxfp4,
    "float16": half,
    "GGUF": gguf_file,
    "SentencePiece": sentencepiece,
    "two chat templates in a folder": two_templates,
    "processor files": processor,
    "own code": own_code,
    "a trainer's folder": trainers,
    "a mixture, separate on disk and fused in memory": mixture,
}


def tensors_in(folder: Path) -> Tensors:
    """Return the tensors of a model folder as transformers chooses its files."""
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    files = sorted(set(index["weight_map"].values()))
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


def compared(made: Made, out: Path) -> dict[str, list[str]]:
    """Return tensors that were lost, or changed although nothing was pruned there, and files that were lost or changed."""
    before = made.tensors if made.tensors is not None else tensors_in(made.model)
    after = tensors_in(out)
    changed = [name for name in before if name in after and not _as_asked(name, before[name], after[name])]
    files, config = fates(made, out), json.loads((out / "config.json").read_text())
    return {
        "settings_lost": sorted(name for name, own in made.settings.items() if config.get(name) != own),
        "tensors_lost": sorted(before.keys() - after.keys()),
        "tensors_new": sorted(after.keys() - before.keys()),
        "tensors_changed_unasked": sorted(changed),
        "files_lost": sorted(name for name, fate in files.items() if (fate in LOST) != (name in made.left)),
    }


AS_IT_IS, BEHIND, LOST = "as it is", "stays behind", ("stays behind", "changed")


def fates(made: Made, out: Path) -> dict[str, str]:
    """Return what became of every file of a source that holds no weights of the model."""
    home = made.model if made.model.is_dir() else made.model.parent
    names = [str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()]
    own = (".safetensors", ".index.json", "pytorch_model.bin")
    return {n: _fate(made, home / n, out / n) for n in names if n in made.left or not n.endswith(own)}


def _fate(made: Made, before: Path, after: Path) -> str:
    if before.name in ("model.safetensors", "model.safetensors.index.json"):
        return BEHIND  # the old one of two
    base = after.with_name("README.base.md")
    if before.name == "README.md" and base.exists() and base.read_bytes() == before.read_bytes():
        return "as `README.base.md`"
    if not after.exists():
        return BEHIND
    if before.read_bytes() == after.read_bytes():
        return AS_IT_IS
    if before.name == "config.json" and made.tensors is not None:
        own, other = (json.loads(path.read_text(encoding="utf-8")) for path in (before, after))
        if own.pop("quantization_config", None) and own == other:
            return "without `quantization_config`"
    return "changed"


def _as_asked(name: str, before: Tensor, after: Tensor) -> bool:
    """Tell whether a tensor is what it was, but for zeros in matrices of layers."""
    if before.dtype != after.dtype or before.shape != after.shape:
        return False
    prunable = "_proj" in name and "eh_proj" not in name and not name.endswith("bias")
    kept = after != 0 if prunable else torch.ones_like(after, dtype=torch.bool)
    bits = [t.contiguous().view(torch.uint8).view(*t.shape, -1)[kept] for t in (before, after)]
    return torch.equal(*bits) and (not prunable or bool(kept.any()))
