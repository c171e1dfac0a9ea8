"""A data folder of a few rows per benchmark, a tokenizer of single bytes and a model that speaks it."""

import json
from pathlib import Path
from typing import Any

import families
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from causalprune.core.types import Decoder
from causalprune.models.anatomy import inspect_model

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


def byte_tokenizer(*, chat: bool = False, bos: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte; `bos` makes it open every plain text with `<s>`."""
    vocab = {"<s>": 0, "</s>": 1}
    vocab |= {symbol: i + 2 for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if bos:
        from tokenizers.processors import TemplateProcessing

        core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE if chat else None
    return tokenizer


def tiny_decoder(*, chat: bool = False, bos: bool = False, positions: int = 1024) -> Decoder:
    """Return a random two-layer Llama on bytes."""
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=1,
    )
    return inspect_model(families.tiny(config), byte_tokenizer(chat=chat, bos=bos), name="tiny")


def write_data(folder: Path, rows: int = 12) -> Path:
    """Write a folder in the layout of `--data-dir`: 12 rows (or more) to calibrate on and 6 to evaluate on."""
    for split, first, count in (("train", 0, rows), ("test", max(100, rows), 6)):
        numbers = range(first, first + count)
        write_jsonl(folder / "gsm8k" / f"{split}.jsonl", [_gsm8k(i) for i in numbers])
        write_jsonl(folder / "arc_challenge" / f"{split}.jsonl", [_arc(i) for i in numbers])
        name = "train" if split == "train" else "dev"
        write_jsonl(folder / "strategyqa" / f"{name}.jsonl", [_strategyqa(i) for i in numbers])
    write_jsonl(folder / "c4_sample" / "c4_excerpts.jsonl", [_excerpt(i) for i in range(20)])
    (folder / "wikitext2").mkdir()
    (folder / "wikitext2" / "wiki.train.slice.txt").write_text(_wiki(0) * (rows // 12), encoding="utf-8")
    (folder / "wikitext2" / "wiki.test.raw").write_text(_wiki(50) * (rows // 12), encoding="utf-8")
    return folder


def write_model(folder: Path, decoder: Decoder | None = None) -> Path:
    """Save a model (the tiny one) and its tokenizer as a folder that loads."""
    decoder = decoder or tiny_decoder()
    decoder.model.save_pretrained(folder)
    decoder.tokenizer.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _gsm8k(i: int) -> dict[str, Any]:
    answer = f"She has {i}+2=<<{i}+2={i + 2}>>{i + 2} pears.\n#### {i + 2}"
    return {"question": f"Ann has {i} pears and gets 2. How many?", "answer": answer}


def _strategyqa(i: int) -> dict[str, Any]:
    return {"question": f"Is {i} even?", "answer": i % 2 == 0, "facts": [f"{i} is a number.", "Even is 2k."]}


def _arc(i: int) -> dict[str, Any]:
    labels = [list("ABCD"), list("1234"), list("ABC"), list("ABCDE")][i % 4]
    choices = [{"label": label, "text": f"{'x' * (k + 1)}{i}"} for k, label in enumerate(labels)]
    return {"question": f"What is {i}?", "choices": choices, "answerKey": labels[i % 3]}


def _excerpt(i: int) -> dict[str, Any]:
    return {"prefix": "not used", "completion": f"Excerpt {i} of the web. " * 8}


def _wiki(first: int) -> str:
    return "".join(
        f" = Title {i} = \n \n Paragraph {i} has words . {'w' * i}\n" for i in range(first, first + 30)
    )
