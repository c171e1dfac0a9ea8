"""Tokenizers of every kind, trained on the spot on a few sentences."""

from collections.abc import Callable
from typing import Any

from tinydata import TEMPLATE
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

SENTENCES = (
    "Ann has 3 pears and gets 2 more. How many pears has she now?",
    "She has 3+2=5 pears.\n#### 5",
    "A train leaves at 7:30 and arrives at 9:15;\n\nhow long is the ride?  It takes 105 minutes.",
    "Yes. No. The answer is (B), since nothing else fits.\n\n\nÄpfel, naïve, 東京, 🙂",
    "\tdef f(x):\n\t\treturn x + 1\n",
)
SPECIAL = ["<unk>", "<s>", "</s>", "[user]", "[assistant]"]


def byte_level(trim: bool = True) -> Tokenizer:
    """Return byte-level BPE, as GPT-2's."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=trim)
    return _trained(
        core,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=SPECIAL,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )


def metaspace(scheme: str) -> Tokenizer:
    """Return BPE on words that carry the space before them, as SentencePiece's; the scheme says which get one."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return _trained(core, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False))


def unigram() -> Tokenizer:
    """Return a unigram model, as T5's, that normalises its text."""
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return _trained(
        core,
        trainers.UnigramTrainer(
            vocab_size=180, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        ),
    )


def word_piece() -> Tokenizer:
    """Return a model of pieces of words that forgets white space, as BERT's."""
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return _trained(
        core, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    )


def opened() -> Tokenizer:
    """Return byte-level BPE that opens and closes a text with tokens of its own."""
    core = byte_level()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return core


def added() -> Tokenizer:
    """Return byte-level BPE with added tokens, one of which takes white space with it."""
    core = byte_level()
    core.add_tokens([AddedToken("####", lstrip=True, rstrip=True), AddedToken(" pears", normalized=False)])
    return core


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "byte level, whole offsets": lambda: byte_level(trim=False),
    "metaspace, always": lambda: metaspace("always"),
    "metaspace, first": lambda: metaspace("first"),
    "metaspace, never": lambda: metaspace("never"),
    "unigram": unigram,
    "word piece": word_piece,
    "opened and closed": opened,
    "added tokens": added,
}


def tokenizer(kind: str, *, chat: bool = False) -> Any:
    """Return a tokenizer of a kind, with a chat template or without."""
    found = PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind](), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    found.chat_template = TEMPLATE if chat else None
    return found


def _trained(core: Tokenizer, trainer: Any) -> Tokenizer:
    core.train_from_iterator(SENTENCES * 20, trainer)
    return core
