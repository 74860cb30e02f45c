"""How alike are two texts? ROUGE, BLEU, METEOR, CodeBLEU, BERTScore and embedding similarity.

A leaf package: rewards score single answers with it, evaluation scores whole test sets. Every function takes
`predictions` and `references` of equal length, where a reference is one text or several alternatives, and
returns one score per row or, where the metric is defined on a corpus, one score. Packages are imported when a metric is
first used; CodeBLEU's parser belongs to the extra `eval`.
"""

from aligntune.textmetrics.codebleu import CodeBleu, codebleu, extract_code
from aligntune.textmetrics.embedding import Encoder, bertscore, load_encoder, random_pair_baseline, semantic_similarity
from aligntune.textmetrics.meteor import meteor
from aligntune.textmetrics.overlap import bleu, rouge, sentence_bleu

__all__ = [
    "CodeBleu",
    "Encoder",
    "bertscore",
    "bleu",
    "codebleu",
    "extract_code",
    "load_encoder",
    "meteor",
    "random_pair_baseline",
    "rouge",
    "semantic_similarity",
    "sentence_bleu",
]
