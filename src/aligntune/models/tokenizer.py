"""Which tokens does the model read? Loading a tokenizer, its padding token and its chat template."""

from __future__ import annotations

import logging
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from aligntune.errors import ModelError
from aligntune.models.files import explain_missing, is_model_folder

logger = logging.getLogger(__name__)

RESERVED_PADS = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|vision_pad|>", "<unk>")


def load_tokenizer(
    name: str, *, pad_token: str | None = None, trust_remote_code: bool = False, generates: bool = True
) -> PreTrainedTokenizerBase:
    """The tokenizer of `name` (hub name or folder) with a padding token; one that `generates` needs an end token too.

    Unset, the padding token is the tokenizer's own, else a reserved token of its vocabulary, else the end-of-sequence token.
    Masks come from lengths, never from token ids, so that a padding token that is also the end token does no harm.
    """
    is_model_folder(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(explain_missing(name, "tokenizer", error)) from error
    if generates and tokenizer.eos_token_id is None:
        raise ModelError(
            f"{name}: the tokenizer has no end-of-sequence token, so that no answer could end; add one to it"
        )
    set_pad_token(tokenizer, pad_token)
    return tokenizer


def set_pad_token(tokenizer: PreTrainedTokenizerBase, wanted: str | None) -> None:
    """Give the tokenizer its padding token; a wanted token that is not in the vocabulary is added to it."""
    if wanted is not None:
        if wanted not in tokenizer.get_vocab():
            logger.info("pad_token %s is new: it is added to the vocabulary", wanted)
            tokenizer.add_special_tokens({"pad_token": wanted})
        tokenizer.pad_token = wanted
    elif tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        tokenizer.pad_token = next((token for token in RESERVED_PADS if token in vocabulary), tokenizer.eos_token)
        if tokenizer.pad_token is None:
            raise ModelError("the tokenizer has no token to pad with; name one as dataset.pad_token")


def fit_embeddings(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Grow the embedding when the tokenizer has more tokens than it; never shrink it."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer))
        model.new_rows = True
