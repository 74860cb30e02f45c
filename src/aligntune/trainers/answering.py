"""Who answers questions to the model of a run, before, between and after its steps?"""

from __future__ import annotations

import logging
from typing import Any

from aligntune.evaluation.answers import GreedyGenerator
from aligntune.rollouts.occasional import occasional_engine
from aligntune.trainers.replica import will_be_sharded

logger = logging.getLogger(__name__)


def generator_of(session: Any) -> GreedyGenerator:
    """Greedy answers of the session's model as it is when asked, in the number format in which it is trained.

    Weights that are split over processes are gathered layer by layer inside transformers' `generate`: a few answers are not
    worth a whole copy on each device.
    """
    model, precision = session.model, session.precision
    if will_be_sharded():
        engine, why = occasional_engine(model, name="transformers")[0], "weights are sharded"
    else:
        engine, why = occasional_engine(model, compute=precision.compute if precision.autocasts else None)
    logger.info("answers by engine %s (%s)", engine.name, why)
    return GreedyGenerator.of(model, session.tokenizer, engine=engine, seed=session.config.train.seed)
