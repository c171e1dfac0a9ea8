"""Texts are cut before merges as the file says, or it is said that they are not; turns end where the file ends them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from families import SMALL, tiny
from ggufs import write_gguf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig

from causalprune.checkpoints.embedded import _described
from causalprune.core.errors import ModelError
from causalprune.models.gguf import Gguf, cut_as, gguf_config, read_gguf
from causalprune.models.loading import load, reading


def words() -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return SimpleNamespace(backend_tokenizer=tokenizer)


def file(rule: str, kind: str = "gpt2") -> Gguf:
    return Gguf("own.gguf", "llama", {}, {}, {}, (kind, rule))


def cut(tokenizer: Any, text: str) -> list[str]:
    return [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def test_digits_are_cut_off_before_blanks_are_joined() -> None:
    """As llama.cpp's rule has it: each digit alone, then GPT-2's, which keeps a last blank for the word that follows."""
    text = ":\n\n1. x =  42"
    assert cut(cut_as(file("smollm"), words()), text) == [":", "ĊĊ", "1", ".", "Ġx", "Ġ=", "ĠĠ", "4", "2"]
    assert cut(cut_as(file("gpt-2"), words()), text) != cut(cut_as(file("smollm"), words()), text)


def test_a_rule_that_is_not_known_is_said() -> None:
    with pytest.warns(UserWarning, match="llama.cpp's rule 'stablelm2', which is not known here"):
        cut_as(file("stablelm2"), words())
    own = words()
    assert cut_as(file("anything", "llama"), own) is own
    assert cut_as(None, own) is own


def llama(path: Path, **settings: Any) -> Path:
    return write_gguf(path, tiny(LlamaConfig(**SMALL, intermediate_size=40, pad_token_id=None)), **settings)


def test_queries_that_would_stay_as_they_are_stored_are_refused(tmp_path: Path) -> None:
    path = llama(tmp_path / "old.gguf", attention__head_count_kv=None)
    with pytest.raises(ModelError, match=r"has llama\.attention\.head_count_kv, which cannot be read"):
        gguf_config(read_gguf(path))


def test_a_file_that_is_loaded_cuts_as_it_says(tmp_path: Path) -> None:
    path = llama(tmp_path / "own.gguf", pre="smollm")
    for tokenizer in (load(str(path)).tokenizer, reading(str(path))[0]):
        assert cut(tokenizer, "x =  42") == ["x", "Ġ=", "ĠĠ", "4", "2"]


def test_the_embedded_model_of_an_earlier_release_is_mended_once(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    _described(tmp_path)
    once = file.read_text()
    mended = SimpleNamespace(backend_tokenizer=Tokenizer.from_file(str(file)))
    assert cut(mended, "x =  42") == ["x", "Ġ=", "ĠĠ", "4", "2"]
    _described(tmp_path)
    assert file.read_text() == once
