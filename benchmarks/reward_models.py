"""Reward models on real text: python benchmarks/reward_models.py --base MODEL --gsm8k FILE --alpaca FILE [--out FILE].

Pairs: a GSM8K question with its own answer (chosen) and the answer to another question (rejected), calculator marks
removed. Three sets of rows without a question in common: trained on, held out to choose the checkpoint, and tested once.
Beside the accuracy on the test pairs stand what it must be compared with: chance; a rule without training (`relevance`,
words of the prompt taken up); the same model with each pair under a third question, which is chance if it reads the
question; and right answers against the same text with another final number, which this training says nothing of.

Texts: the weighted sum of reward functions on the first words of Alpaca answers, distilled; Spearman's rank correlation on
test texts. Intervals are at 95 %: Wilson's for shares, percentile bootstrap for correlations. `--base` is a small encoder, of which `--layers` are kept; they and the head are trained.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from aligntune.config.enums import PrecisionType
from aligntune.config.rewards import RewardModelTrainingConfig
from aligntune.reporting.provenance import package_versions
from aligntune.rewards import RewardSet
from aligntune.rewards.model import RewardModel
from aligntune.trainers.reward_held_out import rank_correlation
from aligntune.trainers.reward_model import RewardTraining, label_texts, train_on_pairs, train_on_texts

Pair = dict[str, str]
DISTILLED = {"sentiment": 1.0, "readability": 1.0}
WORDS = 50
"""Longest text of the distilled rewards, so that the model reads all that they read."""


def wilson(share: float, count: int, z: float = 1.96) -> list[float]:
    """95 % interval of a share (Wilson 1927)."""
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    return [round(middle - half, 4), round(middle + half, 4)]


def bootstrap(one: list[float], other: list[float], draws: int = 2000) -> list[float]:
    """95 % interval of the rank correlation, by resampling rows."""
    dice, count, found = random.Random(0), len(one), []
    for _ in range(draws):
        rows = [dice.randrange(count) for _ in range(count)]
        found.append(rank_correlation([one[at] for at in rows], [other[at] for at in rows]))
    found.sort()
    return [round(found[int(draws * q)], 4) for q in (0.025, 0.975)]


def off_topic(rows: list[dict[str, str]]) -> list[Pair]:
    """Each question with its answer, and with that of the next row."""
    answers = [re.sub(r"<<.*?>>", "", row["answer"]) for row in rows]
    others = answers[1:] + answers[:1]
    return [
        {"prompt": row["question"], "chosen": own, "rejected": other}
        for row, own, other in zip(rows, answers, others, strict=True)
    ]


def other_number(pair: Pair, dice: random.Random) -> Pair:
    """The right answer against itself with another final number of as many digits."""

    def changed(match: re.Match[str]) -> str:
        number = match.group(1)
        while number == match.group(1):
            number = "".join(
                dice.choice("123456789") if at == 0 else dice.choice("0123456789") for at in range(len(number))
            )
        return f"#### {number}"

    digits = re.sub(r"#### .*", lambda match: match.group().replace(",", ""), pair["chosen"])
    return pair | {"chosen": digits, "rejected": re.sub(r"#### -?(\d+)", changed, digits)}


def accuracy(judge: Any, pairs: list[Pair]) -> dict[str, Any]:
    """Share of pairs with chosen above rejected, a tie counting half, with its interval."""
    prompts = [pair["prompt"] for pair in pairs]
    chosen, rejected = (judge(prompts, [pair[side] for pair in pairs]) for side in ("chosen", "rejected"))
    wins = [(one > other) + 0.5 * (one == other) for one, other in zip(chosen, rejected, strict=True)]
    share = sum(wins) / len(wins)
    return {"accuracy": round(share, 4), "interval": wilson(share, len(wins)), "pairs": len(wins)}


def on_pairs(args: argparse.Namespace, out: str) -> dict[str, Any]:
    rows = [json.loads(line) for line in Path(args.gsm8k).read_text(encoding="utf-8").splitlines() if line]
    random.Random(0).shuffle(rows)
    test, rest = rows[: args.test], rows[args.test : args.test + args.pairs]
    held = max(32, args.pairs // 10)
    settings = RewardTraining(
        args.base, out, args.epochs, args.learning_rate, 16, 1, 128, held_out=held / args.pairs, eval_interval=20,
        precision=PrecisionType.FP32,
    )  # fmt: skip
    began = time.perf_counter()
    # Rejected answers come from rows beside them, so that none is of a test question.
    done = train_on_pairs(off_topic(rest), settings, source="gsm8k, own answer against another question's")
    seconds = time.perf_counter() - began
    pairs, dice = off_topic(test), random.Random(1)
    moved = [pair | {"prompt": pairs[at - 7]["prompt"]} for at, pair in enumerate(pairs)]
    relevance = RewardSet(["relevance"])
    rule = lambda prompts, texts: [score or 0.0 for score in relevance.score(prompts, texts).total]  # noqa: E731
    return {
        "training_pairs": args.pairs - int(done.metrics["held_out_rows"]), "seconds": round(seconds),
        "held_out": {name: round(value, 4) for name, value in done.metrics.items()},
        "chance": 0.5,
        "test": accuracy(done.model, pairs),
        "rule_relevance": accuracy(rule, pairs),
        "under_a_third_question": accuracy(done.model, moved),
        "another_final_number": accuracy(done.model, [other_number(pair, dice) for pair in pairs]),
    }  # fmt: skip


def untrained(base: str) -> RewardModel:
    """The base with a random head: what the figures are before training."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    return RewardModel(model, AutoTokenizer.from_pretrained(base), max_length=128)


def on_texts(args: argparse.Namespace, out: str) -> dict[str, Any]:
    rows = json.loads(Path(args.alpaca).read_text(encoding="utf-8"))
    texts = list(
        dict.fromkeys(" ".join(row["output"].split()[:WORDS]) for row in rows if len(row["output"].split()) > 5)
    )
    random.Random(0).shuffle(texts)
    common: dict[str, Any] = {"reward_functions": list(DISTILLED), "reward_weights": list(DISTILLED.values()),
                              "base_model_name": args.base, "output_dir": out}  # fmt: skip
    config = RewardModelTrainingConfig(
        **common, training_texts=texts[args.test :], num_epochs=args.epochs, learning_rate=args.learning_rate, batch_size=16,
        gradient_accumulation_steps=1, max_length=128, eval_interval=20,
    )  # fmt: skip
    began = time.perf_counter()
    done = train_on_texts(config, precision=PrecisionType.FP32)
    seconds = time.perf_counter() - began
    test, wanted = label_texts(RewardModelTrainingConfig(**common, training_texts=texts[: args.test]))
    prompts = [""] * len(test)
    scores, before = done.model(prompts, test), untrained(args.base)(prompts, test)
    return {
        "rewards": DISTILLED, "training_texts": len(texts) - args.test - int(done.metrics["held_out_rows"]),
        "seconds": round(seconds), "held_out": {name: round(value, 4) for name, value in done.metrics.items()},
        "chance": 0.0, "test_texts": len(test),
        "test": {"spearman": round(rank_correlation(scores, wanted), 4), "interval": bootstrap(scores, wanted)},
        "untrained": {"spearman": round(rank_correlation(before, wanted), 4), "interval": bootstrap(before, wanted)},
        "length_alone": round(rank_correlation([float(len(text)) for text in test], wanted), 4),
    }  # fmt: skip


def first_layers(base: str, layers: int, folder: str) -> str:
    """A folder with the first layers of the encoder."""
    from transformers import AutoModel, AutoTokenizer

    AutoModel.from_pretrained(base, num_hidden_layers=layers).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="folder or hub name of a small encoder")
    parser.add_argument("--gsm8k", help="JSON lines with question and answer")
    parser.add_argument("--alpaca", help="JSON list with output")
    parser.add_argument("--layers", type=int, default=6, help="layers of the encoder that are kept")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=560, help="pairs trained on or held out")
    parser.add_argument("--test", type=int, default=150, help="test pairs, and test texts")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--out", help="write the JSON here, too; what it holds of the other task is kept")
    args = parser.parse_args()
    known = Path(args.out) if args.out else None
    result: dict[str, Any] = json.loads(known.read_text(encoding="utf-8")) if known and known.exists() else {}
    result["versions"] = package_versions(("torch", "transformers"))
    words = [word.rpartition("/")[2] for word in sys.argv[1:]]
    command = {"command": " ".join(["python benchmarks/reward_models.py", *words])}
    small = tempfile.mkdtemp()
    args.base = first_layers(args.base, args.layers, small)
    for name, data, measure in (("pairs", args.gsm8k, on_pairs), ("texts", args.alpaca, on_texts)):
        if data is None:
            continue
        folder = tempfile.mkdtemp()
        try:
            result[name] = command | measure(args, folder)
        finally:
            shutil.rmtree(folder)
        print(json.dumps(result[name], indent=2), flush=True)
        if args.out:
            Path(args.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(small)


if __name__ == "__main__":
    main()
