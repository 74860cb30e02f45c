"""Online RL: prompts, rewards, reference, critic and rollout engine of a run, and how its batches fit together."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from aligntune.algorithms import base as algorithms
from aligntune.config.rl import DatasetConfig
from aligntune.data import load_rows, mix, rows_fingerprint, tokenize_prompts
from aligntune.data.template import ChatTemplate
from aligntune.errors import ConfigError, ModelError
from aligntune.evaluation.answers import GreedyGenerator
from aligntune.models.load import load_model
from aligntune.models.tokenizer import fit_embeddings, load_tokenizer
from aligntune.rewards import RewardSet
from aligntune.rollouts.base import SamplingParams
from aligntune.rollouts.select import select_engine
from aligntune.trainers.arguments import training_arguments
from aligntune.trainers.critic import Critic
from aligntune.trainers.dropout import disable_dropout
from aligntune.trainers.held_out import HeldOut
from aligntune.trainers.keeping import keeping_callbacks
from aligntune.trainers.online_trainer import OnlineTrainer, Plan
from aligntune.trainers.ranks import rank, world_size
from aligntune.trainers.reference import Reference
from aligntune.trainers.reward_source import reward_model_of
from aligntune.trainers.rollout_phase import PromptStream, Sampler
from aligntune.trainers.samples import SampleLogger
from aligntune.trainers.session import Session

logger = logging.getLogger(__name__)

LENGTH_STRETCH = 16
"""Phases' worth of prompts that `group_by_length` sorts among themselves."""


class OnlineSession(Session):
    """A run of an algorithm that learns from its own completions."""

    # Parts ----------------------------------------------------------------------------------------------------------

    @cached_property
    def spec(self) -> algorithms.AlgorithmSpec:
        return algorithms.get(self.config.algorithm.value)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        model = self.config.model
        return load_tokenizer(
            model.name_or_path, pad_token=self.config.sources[0].pad_token, trust_remote_code=model.trust_remote_code
        )

    @cached_property
    def train_rows(self) -> Any:
        sources = self.config.sources
        weights = [source.weight for source in sources] if any(source.is_set("weight") for source in sources) else None
        return mix([self._prompts(source) for source in sources], weights, seed=self.config.train.data_seed)

    @cached_property
    def eval_rows(self) -> Any | None:
        source = self.config.eval_source
        return None if source is None else self._prompts(source)

    @cached_property
    def model(self) -> Any:
        model = self._backend.load_policy(self)
        fit_embeddings(model, self.tokenizer)
        if self.config.model.disable_dropout:
            disable_dropout(model)
        return model

    @cached_property
    def rewards(self) -> RewardSet:
        entries: list[Any] = list(self.config.rewards)
        model = reward_model_of(self.config)
        if model is not None:
            entries.append({"type": model})
        return RewardSet(entries, self.config.train.reward_weights, tokenizer=self.tokenizer)

    @cached_property
    def engine(self) -> Any:
        train = self.config.train
        vllm = {"gpu_memory_utilization": train.vllm_gpu_memory_utilization} if train.fast_inference else {}
        engine, why = select_engine(
            self.model, "vllm" if train.fast_inference else "auto", self.sampling, weights_dir=self.directory.path / "vllm", **vllm
        )
        self.recorder.note(f"rollouts by engine {engine.name} ({why})")
        if train.top_p < 1:
            self.recorder.note(
                f"top_p is {train.top_p}: completions come from a narrower distribution than the one the update sees; the mismatch is "
                "logged as sampler_mismatch. Set top_p to 1 for an unbiased ratio",
                level="warning",
            )
        return engine

    @cached_property
    def sampling(self) -> SamplingParams:
        train = self.config.train
        return SamplingParams.build(
            train.generation_kwargs,
            max_new_tokens=train.max_completion_length,
            temperature=train.temperature,
            top_p=train.top_p,
            stop_token_ids=self.stop_token_ids,
            num_generations=self.plan.group,
        )

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """`eos`: every token that ends the model's answers; else the named token alone."""
        name = self.config.train.stop_token
        if name == "eos":
            return GreedyGenerator.of(self.model, self.tokenizer).stop_token_ids
        token = self.tokenizer.get_vocab().get(name)
        if token is None:
            raise ConfigError(f"train.stop_token: {name!r} is not a token of this model; use eos, or a token of its vocabulary")
        return (token,)

    @cached_property
    def plan(self) -> Plan:
        return make_plan(self.config, self.spec)

    @property
    def prompt_budget(self) -> int:
        """Longest prompt in tokens."""
        train, bound = self.config.train, self.config.model.max_seq_length
        room = bound - train.max_completion_length
        if room < 1:
            raise ConfigError(
                f"train.max_completion_length: is {train.max_completion_length}, which leaves no room for a prompt within "
                f"model.max_seq_length {bound}"
            )
        return min(train.max_prompt_length, room)

    def _prompts(self, source: DatasetConfig) -> Any:
        train = self.config.train
        return tokenize_prompts(
            load_rows(source, seed=train.data_seed),
            self.tokenizer,
            source,
            max_prompt_length=self.prompt_budget,
            truncation_mode=source.truncation_mode,
            enable_thinking=train.enable_thinking if train.is_set("enable_thinking") else None,
        )

    # Training -------------------------------------------------------------------------------------------------------

    def build_trainer(self) -> Any:
        return self._backend.build_trainer(self, self.callbacks())

    def callbacks(self) -> list[Any]:
        found: list[Any] = keeping_callbacks(self.config)
        samples = self.config.logging.sample_logging
        if samples.enabled and rank() == 0:
            prompts, ids = self._sample_prompts(samples.prompts)
            found.append(
                SampleLogger(samples, prompts, ids, self.engine, self.tokenizer, self.recorder, self.stop_token_ids, self.config.train.seed)
            )
        return found

    def _sample_prompts(self, texts: Sequence[str] | None) -> tuple[list[Any], list[list[int]]]:
        if texts is None:
            rows = (self.eval_rows or self.train_rows).select(range(min(3, len(self.eval_rows or self.train_rows))))
            return [row.get("prompt", row["prompt_text"]) for row in rows], [list(row["prompt_ids"]) for row in rows]
        if self.tokenizer.chat_template is None or self.config.sources[0].task_type == "text":
            return list(texts), [self.tokenizer(text)["input_ids"] for text in texts]
        template = ChatTemplate(self.tokenizer)
        rendered = [template.prompt([{"role": "user", "content": text}]) for text in texts]
        return list(texts), [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered]

    def optimizer_steps(self) -> int:
        train, plan = self.config.train, self.plan
        if train.max_steps is not None:
            return int(train.max_steps)
        phases = math.ceil(len(self.train_rows) / (plan.prompts * world_size()))
        return phases * plan.steps * (train.epochs or 1)

    def native_trainer(self, callbacks: Sequence[Any]) -> OnlineTrainer:
        """Our own trainer of this run."""
        train, needs = self.config.train, self.spec.needs(self.config.train)
        self.spec.check(train)
        for sentence in self.spec.advice(train):
            self.recorder.note(sentence, level="warning")
        arguments = training_arguments(
            self.config, self.directory.checkpoints, self.precision, max_steps=self.optimizer_steps(), remove_unused_columns=False
        )
        stream = PromptStream(
            self.train_rows, seed=train.data_seed, rank=rank(), world=world_size(),
            group=LENGTH_STRETCH * self.plan.prompts * world_size() if train.group_by_length else 0,
        )  # fmt: skip
        sampler = Sampler(stream, self.engine, self.rewards, self.tokenizer, self.spec, train, self.sampling)
        return OnlineTrainer(
            self.model,
            arguments,
            spec=self.spec,
            settings=train,
            plan=self.plan,
            sampler=sampler,
            reference=Reference.build(self, self.model) if needs.reference else None,
            critic=self._critic() if needs.values else None,
            held_out=self.held_out(),
            processing_class=self.tokenizer,
            callbacks=list(callbacks),
            eval_dataset=self.eval_rows,
            train_dataset=self.train_rows,
        )

    def held_out(self) -> HeldOut | None:
        """The evaluation on held-out prompts, or None without any."""
        if self.eval_rows is None:
            return None
        train = self.config.train
        greedy = SamplingParams(
            max_new_tokens=train.max_completion_length, temperature=0.0, stop_token_ids=self.stop_token_ids, seed=train.seed
        )
        batch = max(train.per_device_eval_batch_size, 1) if train.is_set("per_device_eval_batch_size") else 64
        return HeldOut(self.eval_rows, self.engine, self.rewards, self.tokenizer, greedy, self.recorder, batch)

    def _critic(self) -> Critic:
        model = self.config.model
        if not model.is_set("reward_value_model"):
            return Critic(self.model.config.get_text_config().hidden_size)
        name = model.reward_value_model
        theirs = load_tokenizer(name, trust_remote_code=model.trust_remote_code)
        if theirs.get_vocab() != self.tokenizer.get_vocab():
            raise ModelError(f"model.reward_value_model: {name} has another tokenizer than the policy, so it cannot read its completions")
        config = model.model_copy(update={"quantization": model.value_model_quantization})
        trunk = load_model(config, self.precision, trained=not model.value_model_quantization, name=name, init_kwargs={})
        return Critic(trunk.config.get_text_config().hidden_size, trunk)

    # What a user calls ----------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        if self.eval_rows is None:
            raise ConfigError("there is nothing to evaluate on: give eval_dataset or eval_split")
        held_out = self.held_out()
        assert held_out is not None
        self.metrics = {f"eval_{name}": value for name, value in held_out(0).items()}
        return self.metrics

    def predict(self, inputs: Sequence[Any], *, max_new_tokens: int | None = None) -> list[str]:  # type: ignore[override]
        """Greedy answers. Each input is a text (a user message where prompts are conversations), or a list of messages."""
        chat = self.config.sources[0].task_type == "conversation"
        prompts = [[{"role": "user", "content": item}] if chat and isinstance(item, str) else item for item in inputs]
        limit = max_new_tokens or self.config.train.max_completion_length
        return GreedyGenerator.of(self.model, self.tokenizer).generate(prompts, max_new_tokens=limit)

    def preview(self, rows: int = 3) -> list[list[Any]]:
        """Tokens of the first prompts; none is trained."""
        first = self.train_rows.select(range(min(rows, len(self.train_rows))))
        return [[(self.tokenizer.decode([token]), False) for token in row["prompt_ids"]] for row in first]

    def after(self) -> None:
        if self.eval_rows is None and rank() == 0:
            prompts, ids = self._sample_prompts(None)
            texts = self.engine.generate(ids, self._greedy(1))
            for prompt, tokens in zip(prompts, texts.completion_ids):
                self.recorder.sample(self.trainer.state.global_step, {"prompt": prompt, "completion": self.tokenizer.decode(tokens, skip_special_tokens=True)})

    def _greedy(self, count: int) -> SamplingParams:
        return SamplingParams(
            max_new_tokens=self.config.train.max_completion_length, temperature=0.0, stop_token_ids=self.stop_token_ids, num_generations=count, seed=0
        )

    def fingerprints(self) -> list[Mapping[str, Any]]:
        found: list[Mapping[str, Any]] = []
        for role, source in [*(("train", source) for source in self.config.sources), ("eval", self.config.eval_source)]:
            if source is not None:
                rows = load_rows(source, seed=self.config.train.data_seed)
                found.append({"role": role, "name": source.name, "split": source.split, "rows": len(rows), "fingerprint": rows_fingerprint(rows)})
        return found


def make_plan(config: Any, spec: algorithms.AlgorithmSpec) -> Plan:
    """How rollouts and optimiser steps fit together; a `ConfigError` proposes what would fit."""
    train = config.train
    group = train.num_generations if spec.group_relative else 1
    micro, accumulation = train.per_device_batch_size, train.gradient_accumulation_steps
    step = micro * accumulation
    if train.is_set("rollout_batch_size"):
        completions = train.rollout_batch_size * group
        if completions % step:
            raise ConfigError(
                f"train.rollout_batch_size: {train.rollout_batch_size} prompts x {group} completions = {completions} do not fill whole "
                f"optimiser steps of {micro} x {accumulation} completions; choose a multiple of {step // math.gcd(step, group)}"
            )
        prompts = train.rollout_batch_size
    else:
        if step % group:
            raise ConfigError(
                f"train.gradient_accumulation_steps: {micro} x {accumulation} completions a step do not hold whole groups of {group}; "
                f"choose a multiple of {group // math.gcd(micro, group)}, or set rollout_batch_size"
            )
        prompts = step // group
    return Plan(prompts, group, micro, accumulation, spec.epochs(train))
