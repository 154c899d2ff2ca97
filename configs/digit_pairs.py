"""Two handwritten digits side by side, with captions such as "a three and a seven".

The data set of config_digit_pairs.json. As a program it writes the text encoder of that config, a
frozen transformer of random weights whose words are those of the captions:

    python configs/digit_pairs.py digit_words
"""

import sys

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def caption(left, right):
    """What a picture of two digits is called."""
    return f"{_with_article(left)} and {_with_article(right)}"


def _with_article(digit):
    return f"{'an' if digit == 8 else 'a'} {WORDS[digit]}"


def held_out(left, right):
    """Whether a pair, a tenth of all, is never trained on: "a three and a seven" is such a one."""
    return (left + right) % 10 == 0


class Pairs:
    """Items (image, class, caption), 8 x 16 pixels, drawn by their number from the digits.

    digits: of `split` "train", all but every fifth of each class, or "test", every fifth.
    """

    def __init__(self, transform, length, split):
        digits = load_digits()
        seen, kept = np.zeros(10, int), []
        for i, digit in enumerate(digits.target):
            seen[digit] += 1
            if (seen[digit] % 5 == 0) == (split == "test"):
                kept.append(i)
        self.images = np.rint(digits.images[kept] * (255 / 16)).astype(np.uint8)
        self.digits = digits.target[kept]
        self.transform, self.length = transform, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        random = np.random.default_rng(index)
        while True:
            pair = random.integers(len(self.digits), size=2)
            left, right = self.digits[pair].tolist()
            if not held_out(left, right):
                image = np.concatenate(list(self.images[pair]), axis=1)
                return self.transform(Image.fromarray(image)), 0, caption(left, right)


def get_dataset(config, transform):
    """What train.py calls. config: `length`, the number of items, and `split`."""
    return Pairs(transform, config.get("length", 20_000), config.get("split", "train"))


def write_text_encoder(folder):
    """A BERT of one layer, not trained, and its tokenizer: a vector for each word and place."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "a", "an", "and", *WORDS]
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 8}
    BertModel(BertConfig(vocab_size=len(words), **sizes, **heads)).save_pretrained(folder)
    split = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    split.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=split, **names).save_pretrained(folder)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write_text_encoder(sys.argv[1])


if __name__ == "__main__":
    main()
