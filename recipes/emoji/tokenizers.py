"""The two tokenizers: CLIP's byte-pair encoding for English, BERT's WordPiece for Chinese, each with a small vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

from recipes.emoji.captions import Captioner

MAX_LENGTH = 77
START, END = "<|startoftext|>", "<|endoftext|>"


def corpus(captioner: Captioner, count: int = 30_000) -> tuple[list[str], list[str]]:
    """Captions to learn the vocabularies from; every name occurs."""
    scenes = captioner.batch(count, 128, 128)
    names_en = [name for c in captioner.concepts for name in c["en"]]
    names_zh = [name for c in captioner.concepts for name in c["zh"]]
    return scenes["en"] + 3 * names_en, scenes["zh"] + 3 * names_zh + scenes["en"][:5000] + 2 * names_en


def train_clip(texts: list[str], folder: Path, vocab_size: int) -> None:
    """Byte-pair merges in CLIP's layout: 256 bytes, 256 bytes that end a word, merges, start and end."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 400, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [b + "</w>" for b in alphabet] + [a + b for a, b in merges]
    vocab = {word: number for number, word in enumerate(dict.fromkeys([*words, START, END]))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)
    tokenizer.save_pretrained(folder)


def train_bert(texts: list[str], folder: Path, vocab_size: int) -> None:
    """WordPiece in BERT's layout: special tokens, Chinese characters, English words and pieces."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizer

    letters = list("abcdefghijklmnopqrstuvwxyz0123456789,.!?:;'()-，。！？、：；（）")
    trained = BertWordPieceTokenizer(lowercase=True)
    trained.train_from_iterator(
        [*texts, *letters], vocab_size=vocab_size, min_frequency=1, limit_alphabet=3000, show_progress=False
    )
    vocab = trained.get_vocab()
    BertTokenizer(vocab=vocab, do_lower_case=True, model_max_length=MAX_LENGTH).save_pretrained(folder)


def train_tokenizers(folder: Path, captioner: Captioner) -> None:
    english, chinese = corpus(captioner)
    train_clip(english, folder / "tokenizer", vocab_size=2400)
    train_bert(chinese, folder / "tokenizer_zh", vocab_size=3000)
