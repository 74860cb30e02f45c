"""How good is this text? Reward functions, their combination, a sandbox for code, reward models as judges.

`reward` registers a function, `get` finds one by name or path, `RewardSet` scores with several. Importing this
package imports no model library; a reward loads what it needs when it is first called.
"""

from . import (
    code,
    code_style,
    environments,
    format,
    judge,
    matching,
    math,
    model,
    prose,
    reference,
    safety,
    sql,
    text,
    tone,
    tools,
)
from .base import Example, Reward, adversarial, bad, describe, get, good, names, reward
from .combine import RewardSet, Scores, Stages
from .samples import Batch, completion_text, prompt_text

BUILT_IN = (
    code,
    code_style,
    environments,
    format,
    judge,
    matching,
    math,
    model,
    prose,
    reference,
    safety,
    sql,
    text,
    tone,
    tools,
)
"""The modules whose import registers the rewards of the library."""

__all__ = [
    "BUILT_IN",
    "Batch",
    "Example",
    "Reward",
    "RewardSet",
    "Scores",
    "Stages",
    "adversarial",
    "bad",
    "completion_text",
    "describe",
    "get",
    "good",
    "names",
    "prompt_text",
    "reward",
]
