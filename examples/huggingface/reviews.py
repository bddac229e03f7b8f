"""Movie-review sentences with their sentiment, which `make .venv/reviews.tsv` fetches, and small models for them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

_FILE = Path(__file__).parents[2] / ".venv/reviews.tsv"


class Review(NamedTuple):
    text: str
    is_positive: bool


def load_reviews(num_reviews: int) -> list[Review]:
    """The first of 10,605 sentences."""
    if not _FILE.exists():
        sys.exit(f"{_FILE} is missing: run `make .venv/reviews.tsv` first")
    rows = [line.split("\t") for line in _FILE.read_text("utf-8").splitlines()[:num_reviews]]
    return [Review(text.lower(), float(sentiment) > 0) for _, sentiment, text in rows]


def make_tokenizer(reviews: list[Review]) -> Any:
    """One token a word."""
    words = sorted({word for review in reviews for word in review.text.split()})
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[MASK]", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="[PAD]", mask_token="[MASK]"
    )


def tokenized(reviews: list[Review], tokenizer: Any) -> Any:
    """Samples of a classification."""
    return [dict(tokenizer(review.text)) | {"label": int(review.is_positive)} for review in reviews]


def make_bert(kind: str, tokenizer: Any, **config: Any) -> Any:
    """A small DistilBert with dropout, the same every time; kind: "SequenceClassification", "MaskedLM" ..."""
    sizes = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model_class = getattr(transformers, f"DistilBertFor{kind}")
    return model_class(transformers.DistilBertConfig(vocab_size=len(tokenizer), **(sizes | config)))
