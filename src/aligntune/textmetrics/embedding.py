"""How alike do two texts look to a neural encoder? BERTScore and cosine similarity of mean-pooled embeddings.

BERTScore: Zhang et al. 2020 (arXiv 1904.09675). Tokens of the two texts are matched greedily by the cosine of their
contextual embeddings; recall is the mean over the reference's tokens, precision over the prediction's, F1 joins them.
As in the authors' code, special tokens weigh nothing but may be matched. Every pair is compared at its own length, so
scores do not depend on the batch (in the authors' code a padded cell counts as similarity 0).

Semantic similarity: Reimers and Gurevych 2019 (Sentence-BERT, arXiv 1908.10084): cosine of the means of the last
layer's token vectors.
"""

from __future__ import annotations

import logging
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aligntune.errors import ConfigError, DataError, ModelError
from aligntune.textmetrics.rows import Reference, reference_lists

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

Scores = dict[str, list[float]]
Baseline = tuple[float, float, float]
"""Precision, recall and F1 of unrelated texts."""

TUNED_LAYERS = {
    "bert-base-uncased": 9,
    "bert-large-uncased": 18,
    "bert-base-multilingual-cased": 9,
    "bert-base-chinese": 8,
    "roberta-base": 10,
    "roberta-large": 17,
    "roberta-large-mnli": 19,
    "distilroberta-base": 5,
    "distilbert-base-uncased": 5,
    "xlm-roberta-base": 9,
    "xlm-roberta-large": 17,
    "deberta-base-mnli": 9,
    "deberta-large-mnli": 18,
    "deberta-xlarge-mnli": 40,
    "deberta-v3-base": 9,
    "deberta-v3-large": 12,
}
"""Layer that correlates best with human judgement on WMT16, as published by the BERTScore authors."""

_TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class Encoder:
    """A transformer that gives token vectors: an `AutoModel` (any architecture) and its tokenizer."""

    model: Any
    tokenizer: Any
    name: str = ""

    @property
    def depth(self) -> int:
        config = self.model.config
        return int(config.get_text_config().num_hidden_layers)

    @contextmanager
    def on(self, device: str | None) -> Iterator[None]:
        """The model on `device` for a while (None: where it is), then back where it was."""
        home = next(self.model.parameters()).device
        if device is not None:
            self.model.to(device)
        try:
            yield
        finally:
            self.model.to(home)

    def default_layer(self) -> int:
        """The published layer of a known model, else the one at three quarters of the depth, where those lie."""
        tuned = TUNED_LAYERS.get(self.name.rstrip("/").rsplit("/", 1)[-1])
        return min(tuned, self.depth) if tuned is not None else max(1, round(0.75 * self.depth))

    def max_length(self) -> int:
        """Tokens per text that tokenizer and model both take."""
        config = self.model.config
        positions = getattr(config, "max_position_embeddings", None) or 1 << 30
        if getattr(config, "model_type", "") in _OFFSET_POSITIONS:
            positions -= (config.pad_token_id or 0) + 1
        return int(min(self.tokenizer.model_max_length, positions))

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids with special tokens, cut to `max_length`, not padded."""
        encoded = self.tokenizer([text.strip() for text in texts], truncation=True, max_length=self.max_length())
        return [list(ids) for ids in encoded["input_ids"]]

    def vectors(self, ids: Sequence[Sequence[int]], layer: int) -> list[Tensor]:
        """Per text, a float32 [tokens, hidden] tensor on the CPU: the output of `layer` (0: the embeddings)."""
        import torch

        if not 0 <= layer <= self.depth:
            raise ConfigError(f"layer {layer} does not exist: the encoder has layers 0 to {self.depth}")
        device = next(self.model.parameters()).device
        pad = self.tokenizer.pad_token_id or 0
        out: list[Any] = [None] * len(ids)
        with torch.inference_mode():
            for batch in _batches(ids):
                longest = max(len(ids[at]) for at in batch)
                rows = [list(ids[at]) + [pad] * (longest - len(ids[at])) for at in batch]
                mask = [[1] * len(ids[at]) + [0] * (longest - len(ids[at])) for at in batch]
                output = self.model(
                    input_ids=torch.tensor(rows, device=device),
                    attention_mask=torch.tensor(mask, device=device),
                    output_hidden_states=layer != self.depth,
                )
                hidden = output.last_hidden_state if layer == self.depth else output.hidden_states[layer]
                for at, states in zip(batch, hidden.float().cpu(), strict=True):
                    out[at] = states[: len(ids[at])]
        return out


_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer")
"""Architectures whose position ids begin after the padding id."""


def _batches(ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of texts of like length, at most `_TOKENS_PER_BATCH` padded tokens at a time."""
    batch: list[int] = []
    for at in sorted(range(len(ids)), key=lambda at: -len(ids[at])):
        if batch and (len(batch) + 1) * len(ids[batch[0]]) > _TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(at)
    if batch:
        yield batch


def load_encoder(name_or_path: str, *, device: str | None = None, word_prefix_space: bool = False) -> Encoder:
    """Load an encoder from a folder or the hub, in float32 and evaluation mode.

    `device` defaults to CUDA where there is one. `word_prefix_space` makes byte-level BPE tokenizers (RoBERTa,
    DeBERTa) treat the first word as any other, which BERTScore does. Raises `ModelError` if it cannot be loaded.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    options = {"add_prefix_space": True} if word_prefix_space else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **options)
        model = AutoModel.from_pretrained(name_or_path, dtype=torch.float32)
    except (OSError, ValueError) as error:  # what transformers raises for a missing, gated or unknown model
        raise ModelError(
            f"the encoder {name_or_path!r} cannot be loaded: give the path of a folder with a transformers model and "
            f"its tokenizer, or a hub name that this machine can reach ({str(error).splitlines()[0]})"
        ) from error
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Encoder(model.eval().to(target), tokenizer, name_or_path)


def bertscore(
    predictions: Sequence[str],
    references: Sequence[Reference],
    encoder: Encoder,
    *,
    layer: int | None = None,
    idf: bool = False,
    baseline: Baseline | None = None,
) -> Scores:
    """BERTScore `precision`, `recall` and `f1` of each row; of several references the one with the best F1 counts.

    `layer`: output of which encoder layer (default: `Encoder.default_layer`). `idf`: weigh tokens by
    log((N + 1) / (df + 1)) over the N references. `baseline`: scores of unrelated texts with this encoder and layer
    (published tables, or `random_pair_baseline`); each score x becomes (x - b) / (1 - b) (section 3 of the paper).
    An empty prediction scores 0 before rescaling.
    """
    rows = reference_lists(predictions, references)
    at_layer = encoder.default_layer() if layer is None else layer
    weights = _Idf(encoder, [text for row in rows for text in row]) if idf else None
    texts = list(dict.fromkeys([*predictions, *(text for row in rows for text in row)]))
    ids = encoder.token_ids(texts)
    states = encoder.vectors(ids, at_layer)
    known = {text: _Text(encoder, ids[at], states[at], weights) for at, text in enumerate(texts)}
    scores: Scores = {"precision": [], "recall": [], "f1": []}
    for prediction, row in zip(predictions, rows, strict=True):
        best = max((greedy_match(known[prediction], known[text]) for text in row), key=lambda prf: prf[2])
        for name, value, floor in zip(scores, best, baseline or (0.0, 0.0, 0.0), strict=True):
            scores[name].append((value - floor) / (1 - floor))
    return scores


class _Text:
    """Unit token vectors [tokens, hidden] and token weights [tokens] (0 for special tokens) of one text."""

    def __init__(self, encoder: Encoder, ids: list[int], vectors: Tensor, weights: _Idf | None) -> None:
        import torch

        names = ("cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id")  # not [UNK]: it stands for a word
        special = {getattr(encoder.tokenizer, name, None) for name in names}
        values = [0.0 if i in special else weights[i] if weights else 1.0 for i in ids]
        self.vectors = torch.nn.functional.normalize(vectors, dim=-1)
        self.weights = torch.tensor(values, dtype=torch.float32)


class _Idf:
    """Inverse document frequency of token ids over a set of texts."""

    def __init__(self, encoder: Encoder, documents: list[str]) -> None:
        self._count = Counter(token for ids in encoder.token_ids(documents) for token in set(ids))
        self._documents = len(documents)

    def __getitem__(self, token: int) -> float:
        return math.log((self._documents + 1) / (self._count[token] + 1))


def greedy_match(prediction: Any, reference: Any) -> Baseline:
    """Precision, recall and F1 of greedy cosine matching (equation 1 of the paper, weighted as in its section 3).

    Both sides have `.vectors` [tokens, hidden] of unit length and `.weights` [tokens]; a side without any weight
    (an empty text) gives 0.
    """
    total_left, total_right = float(prediction.weights.sum()), float(reference.weights.sum())
    if total_left == 0 or total_right == 0:
        return 0.0, 0.0, 0.0
    similarity = prediction.vectors @ reference.vectors.T
    precision = float(similarity.max(dim=1).values @ prediction.weights) / total_left
    recall = float(similarity.max(dim=0).values @ reference.weights) / total_right
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return precision, recall, f1


def random_pair_baseline(
    texts: Sequence[str], encoder: Encoder, *, layer: int | None = None, pairs: int = 1000, seed: int = 0
) -> Baseline:
    """Mean BERTScore of `pairs` random pairs of unlike `texts`: the paper's baseline, on texts of the user's choice."""
    distinct = list(dict.fromkeys(texts))
    if len(distinct) < 2:
        raise DataError("a BERTScore baseline needs at least two different texts")
    rng = random.Random(seed)
    drawn = [rng.sample(distinct, 2) for _ in range(pairs)]
    scores = bertscore([left for left, _ in drawn], [right for _, right in drawn], encoder, layer=layer)
    precision, recall, f1 = (sum(scores[name]) / pairs for name in ("precision", "recall", "f1"))
    return precision, recall, f1


def semantic_similarity(predictions: Sequence[str], references: Sequence[Reference], encoder: Encoder) -> list[float]:
    """Cosine in [-1, 1] of the mean token vectors of each prediction and its (best matching) reference.

    All tokens count, special ones too, as in sentence-transformers' mean pooling.
    """
    import torch

    rows = reference_lists(predictions, references)
    texts = list(dict.fromkeys([*predictions, *(text for row in rows for text in row)]))
    vectors = encoder.vectors(encoder.token_ids(texts), encoder.depth)
    pooled = torch.nn.functional.normalize(torch.stack([states.mean(dim=0) for states in vectors]), dim=-1)
    known = dict(zip(texts, pooled, strict=True))
    return [
        max(float(known[prediction] @ known[text]) for text in row)
        for prediction, row in zip(predictions, rows, strict=True)
    ]
