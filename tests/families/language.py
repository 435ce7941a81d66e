"""A language model of words in place of BERT, whose weights and tokenizer are downloads."""

import re

import torch
from torch import Tensor, nn

__all__ = ["WordModel"]


class _Tokens(dict):
    """One token per word or full stop of a caption, behind one that opens it."""

    def __init__(self, caption: str) -> None:
        self.spans = [match.span() for match in re.finditer(r"\w+|\.", caption)]
        words = [caption[start:end] for start, end in self.spans]
        ids = [0, *(1 + sum(map(ord, word)) % 99 for word in words)]
        super().__init__(input_ids=torch.tensor([ids]))

    def char_to_token(self, position: int) -> int | None:
        for index, (start, end) in enumerate(self.spans):
            if start <= position < end:
                return index + 1
        return None


class WordModel(nn.Module):
    """What Grounding DINO asks of its language model, with one embedding per word."""

    max_tokens = 256
    pad_to_max = False

    def __init__(self, channels: int = 768) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, channels)
        self.language_backbone = nn.Module()
        self.language_backbone.body = nn.Module()
        self.language_backbone.body.language_dim = channels

    def tokenizer(self, captions: list[str], **_: object) -> _Tokens:
        (caption,) = captions
        return _Tokens(caption)

    def forward(self, captions: list[str]) -> dict[str, Tensor]:
        ids = torch.cat([_Tokens(caption)["input_ids"] for caption in captions])
        batch, length = ids.shape
        return dict(
            embedded=self.embedding(ids),
            masks=torch.ones(batch, length, length, dtype=torch.bool),
            position_ids=torch.arange(length).repeat(batch, 1),
            text_token_mask=torch.ones(batch, length, dtype=torch.bool),
        )
