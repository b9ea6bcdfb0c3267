"""Documents as token ids, and the tokenizer that a corpus gives."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sslscale.errors import missing_package
from sslscale.shards.decode import DecodeError, find_member
from sslscale.shards.readers import Reader

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD = -1
"""What fills a batch beside a text: no tokenizer's id, so that no text can hold it."""
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
"""The first ids of a tokenizer that is trained here."""
_CHARACTERS_A_TOKEN = 64  # a text is cut to so many before it is split: a book must not cost a book's time and memory


@dataclass(frozen=True)
class TextReader(Reader):
    """int32 (L,), L <= max_length: token ids, special ones included. A batch is (B, longest L), filled up with PAD.

    A longer text keeps its first tokens. `tokenizer` is a tokenizers file.
    """

    tokenizer: str
    max_length: int

    def content(self, sample: dict[str, Any]) -> bytes:
        return find_member(sample, ("txt",), "text")[1]

    def read(self, sample: dict[str, Any]) -> np.ndarray:
        text = text_of(sample)[: self.max_length * _CHARACTERS_A_TOKEN]
        return np.array(load_tokenizer(self.tokenizer, self.max_length).encode(text).ids, dtype=np.int32)

    def collate(self, rows: list[np.ndarray], size: int | None = None, pinned: bool = False) -> Tensor:
        """`size` changes nothing: batches differ in length anyway."""
        batch = torch.full((len(rows), max(map(len, rows))), PAD, dtype=torch.int32, pin_memory=pinned)
        for row, ids in zip(batch.numpy(), rows, strict=True):
            row[: len(ids)] = ids
        return batch


def text_of(sample: dict[str, Any]) -> str:
    """The sample's text. Raises DecodeError where it has none, where it is not UTF-8, and where it is blank."""
    extension, data = find_member(sample, ("txt",), "text")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise DecodeError(f"the .{extension} is not UTF-8: byte {error.start} is {data[error.start]:#04x}") from None
    if not text.strip():
        raise DecodeError(f"the .{extension} is empty")
    return text


@functools.lru_cache(maxsize=8)
def load_tokenizer(file: str, max_length: int) -> Tokenizer:
    """A tokenizers file, cutting texts at `max_length` tokens and padding nothing."""
    tokenizer = _tokenizers().Tokenizer.from_file(file)
    tokenizer.enable_truncation(max_length)
    tokenizer.no_padding()
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, lowercase: bool, file: Path) -> None:
    """A byte-level BPE (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909) of `texts`, [CLS] text [SEP].

    The first ids are SPECIAL's; every text can be written with it.
    """
    t = _tokenizers()
    tokenizer = t.Tokenizer(t.models.BPE())
    normal = [t.normalizers.NFC(), *([t.normalizers.Lowercase()] if lowercase else [])]
    tokenizer.normalizer = t.normalizers.Sequence(normal)
    tokenizer.pre_tokenizer = t.pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = t.decoders.ByteLevel()
    trainer = t.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=t.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_cut(texts), trainer)
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = t.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    file.write_text(tokenizer.to_str())


def _cut(texts: Iterable[str]) -> Iterator[str]:
    return (text[: 512 * _CHARACTERS_A_TOKEN] for text in texts)


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise missing_package("tokenizers", "text") from None
    return tokenizers
