"""A language model of words in place of BERT, whose weights and tokenizer are downloads."""

import re

import torch
from torch import Tensor, nn

__all__ = ["WordConfig", "WordModel"]


class _Tokens(dict):
    """One token per word or full stop of a caption, behind one that opens it."""

    def __init__(self, caption: str) -> None:
        self.spans = [match.span() for match in re.finditer(r"\w+|\.", caption)]
        words = [caption[start:end] for start, end in self.spans]
        ids = [100, *(1 + sum(map(ord, word)) % 99 for word in words)]
        self.input_ids = torch.tensor([ids])
        super().__init__(input_ids=self.input_ids)

    def char_to_token(self, position: int) -> int | None:
        for index, (start, end) in enumerate(self.spans):
            if start <= position < end:
                return index + 1
        return None


class WordConfig:
    """What GLIP's head asks of the language model's settings."""

    hidden_size = 768

    @classmethod
    def from_pretrained(cls, name: str) -> "WordConfig":
        return cls()


class WordModel(nn.Module):
    """What Grounding DINO and GLIP ask of their language model, with one embedding per word.

    Args:
        padded: GLIP's way: captions are filled up to 256 tokens, and masks tell words from filling.
            Otherwise masks tell which words attend to which.
    """

    max_tokens = 256
    pad_to_max = False

    def __init__(self, padded: bool) -> None:
        super().__init__()
        self.padded = padded
        self.embedding = nn.Embedding(101, WordConfig.hidden_size)
        self.language_backbone = nn.Module()
        self.language_backbone.body = nn.Module()
        self.language_backbone.body.language_dim = WordConfig.hidden_size

    def tokenizer(self, captions: list[str], **_: object) -> _Tokens:
        (caption,) = captions
        return _Tokens(caption)

    def forward(self, captions: list[str]) -> dict[str, Tensor]:
        ids = torch.cat([_Tokens(caption)["input_ids"] for caption in captions])
        if self.padded:
            ids = nn.functional.pad(ids, (0, self.max_tokens - ids.shape[1]))
            return dict(embedded=self.embedding(ids), masks=(ids > 0).long())
        batch, length = ids.shape
        return dict(
            embedded=self.embedding(ids),
            masks=torch.ones(batch, length, length, dtype=torch.bool),
            position_ids=torch.arange(length).repeat(batch, 1),
            text_token_mask=torch.ones(batch, length, dtype=torch.bool),
        )
