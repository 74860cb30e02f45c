"""Which metrics of answers are built in? One function each: what `compute_*` switches on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aligntune import textmetrics
from aligntune.evaluation.registry import EncoderSource, metric
from aligntune.textmetrics import Encoder

Scores = dict[str, Any]


@metric("rouge", setting="compute_rouge", packages=("rouge_score.rouge_scorer",))
def rouge(predictions: Sequence[str], references: Sequence[str]) -> Scores:
    """ROUGE F-measures, 0 to 1."""
    return dict(textmetrics.rouge(predictions, references, types=("rouge1", "rouge2", "rougeL")))


@metric("bleu", setting="compute_bleu", packages=("sacrebleu",))
def bleu(predictions: Sequence[str], references: Sequence[str]) -> Scores:
    """Corpus BLEU, 0 to 100."""
    return {"bleu": textmetrics.bleu(predictions, references)}


@metric("meteor", setting="compute_meteor", packages=("nltk.stem.porter",))
def meteor(predictions: Sequence[str], references: Sequence[str]) -> Scores:
    """METEOR, 0 to 1."""
    return {"meteor": textmetrics.meteor(predictions, references)}


@metric(
    "codebleu",
    setting="compute_codebleu",
    packages=("tree_sitter", "tree_sitter_python"),
)
def codebleu(predictions: Sequence[str], references: Sequence[str], language: str | Sequence[str] = "python") -> Scores:
    """CodeBLEU, 0 to 1, of the fenced code in answers, or of the whole answer; Python unless there is a column `language`."""
    left, right = (list(map(textmetrics.extract_code, texts)) for texts in (predictions, references))
    scores = textmetrics.codebleu(left, right, language).as_dict()
    return {name if name == "codebleu" else f"codebleu_{name}": value for name, value in scores.items()}


@metric(
    "bertscore",
    setting="compute_bertscore",
    encoder=EncoderSource("bertscore_model", word_prefix_space=True),
)
def bertscore(predictions: Sequence[str], references: Sequence[str], encoder: Encoder) -> Scores:
    """BERTScore without rescaling, at the encoder's published layer."""
    scores = textmetrics.bertscore(predictions, references, encoder)
    return {f"bertscore_{name}": values for name, values in scores.items()}


@metric(
    "semantic_similarity",
    setting="compute_semantic_similarity",
    encoder=EncoderSource("semantic_similarity_model"),
)
def semantic_similarity(predictions: Sequence[str], references: Sequence[str], encoder: Encoder) -> Scores:
    """Cosine of mean-pooled sentence embeddings, -1 to 1."""
    return {"semantic_similarity": textmetrics.semantic_similarity(predictions, references, encoder)}
