"""A tiny text encoder of transformers, its words and weights made here."""

import pytest
import torch

WORDS = ["a", "and", "one", "two", "three", "big", "small"]


def save(folder, words=WORDS, width=12, pad=True, tokenizer=True, seed=0):
    """A BERT of one layer, its tokens words; returns the folder as text."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    special = ["[PAD]", "[UNK]"]
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    transformers.BertModel(config).save_pretrained(folder)
    if tokenizer:
        model = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
        made = tokenizers.Tokenizer(model)
        made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        names = {"pad_token": "[PAD]"} if pad else {}
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=made, unk_token="[UNK]", **names
        )
        fast.save_pretrained(folder)
    return str(folder)
