"""Online RL: prompts, rewards, reference, critic and rollout engine of a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from aligntune.algorithms import base as algorithms
from aligntune.config.rl import DatasetConfig
from aligntune.data import asked_of, tokenize_prompts
from aligntune.data.preview import row_tokens
from aligntune.errors import ConfigError, ModelError
from aligntune.evaluation.answers import answer_ends, model_ends
from aligntune.models.forward import check_packed, use_padding
from aligntune.models.load import load_model
from aligntune.models.tokenizer import load_tokenizer
from aligntune.rewards import RewardSet
from aligntune.rollouts.base import SamplingParams
from aligntune.rollouts.rounded import RoundedEngine
from aligntune.rollouts.select import select_engine
from aligntune.trainers.answering import read_questions
from aligntune.trainers.arguments import own_optimizer, training_arguments
from aligntune.trainers.asking import Asker
from aligntune.trainers.compiling import compile_model
from aligntune.trainers.critic import Critic
from aligntune.trainers.dropout import disable_dropout
from aligntune.trainers.held_out import HeldOut
from aligntune.trainers.live_engine import LiveEngine
from aligntune.trainers.online_checks import check_online
from aligntune.trainers.online_metrics import gathered_moments
from aligntune.trainers.online_plan import Plan, make_plan, prompt_budget
from aligntune.trainers.online_trainer import OnlineTrainer
from aligntune.trainers.own import with_own_functions
from aligntune.trainers.prompt_stream import PromptStream
from aligntune.trainers.ranks import rank, world_size
from aligntune.trainers.reference import Reference
from aligntune.trainers.replica import engine_of_sharded
from aligntune.trainers.reward_source import reward_model_of
from aligntune.trainers.rollout_phase import Sampler
from aligntune.trainers.samples import SampleLogger
from aligntune.trainers.session import Session

logger = logging.getLogger(__name__)

SHOWN = 4
"""Prompts answered before and after training, for the report."""


class OnlineSession(Session):
    """A run of an algorithm that learns from its own completions."""

    # Parts ----------------------------------------------------------------------------------------------------------

    @cached_property
    def spec(self) -> algorithms.AlgorithmSpec:
        """What the trainer may know of the algorithm; what this machine cannot do is refused here."""
        return self.checked_spec(with_own_functions(algorithms.get(self.config.algorithm.value), self.config.train))

    def checked_spec(self, spec: algorithms.AlgorithmSpec) -> algorithms.AlgorithmSpec:
        """`spec`, once it is clear that the run's settings can act here."""
        check_online(self.config)
        spec.check(self.config.train)
        return spec

    @cached_property
    def plan(self) -> Plan:
        return make_plan(self.config, self.spec.group_relative)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        model = self.config.model
        tokenizer = load_tokenizer(
            model.name_or_path, pad_token=self.config.sources[0].pad_token, trust_remote_code=model.trust_remote_code
        )
        return self.templated(tokenizer)

    @cached_property
    def train_rows(self) -> Any:
        return self.training_rows()

    def training_rows(self) -> Any:
        """The prompts of the training data."""
        self._check_settings()
        return self.mixed([self._prompts(source) for source in self.config.sources])

    @cached_property
    def eval_rows(self) -> Any | None:
        source = self.config.eval_source
        return None if source is None else self._prompts(source)

    @cached_property
    def model(self) -> Any:
        self.rewards  # noqa: B018  (a reward model that is not there before a policy that is)
        model = self._backend.load_policy(self, tokenizer=self.tokenizer)
        if self.config.model.disable_dropout:
            disable_dropout(model)
        if self._backend.name == "native":  # the others lay out their batches themselves
            self._choose_batches(model)
        return model

    @cached_property
    def rewards(self) -> RewardSet:
        """The reward functions and the reward model, summed by weight (the model's is 1)."""
        entries: list[Any] = list(self.config.rewards)
        weights = self.config.train.reward_weights
        model = reward_model_of(self.config)
        if model is not None:
            entries.append({"type": model})
            weights = [*weights, 1.0] if weights is not None else None
        rewards = RewardSet(entries, weights, tokenizer=self.tokenizer, reduce=gathered_moments)
        for name, statement in rewards.isolation().items():
            self.recorder.note(f"reward {name} runs code; {statement}")
        return rewards

    @cached_property
    def engine(self) -> LiveEngine:
        train = self.config.train
        vllm = {"gpu_memory_utilization": train.vllm_gpu_memory_utilization} if train.fast_inference else {}

        def select(model: Any) -> Any:
            name = "vllm" if train.fast_inference else "auto"
            engine, why = select_engine(model, name, self.sampling, weights_dir=self.directory.path / "vllm", **vllm)
            if self.precision.autocasts and not train.fast_inference:
                engine = RoundedEngine(engine, model, self.precision.compute)
            return engine, why

        engine, why = engine_of_sharded(self.model, select, gather=train.ds3_gather_for_generation)
        self.recorder.note(f"rollouts by engine {engine.name} ({why})")
        return LiveEngine(engine)

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

    @property
    def greedy(self) -> SamplingParams:
        """One answer to each prompt, always the same."""
        limit = self.config.train.max_completion_length
        return SamplingParams(
            max_new_tokens=limit, temperature=0.0, stop_token_ids=self.stop_token_ids, seed=self.config.train.seed
        )

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """`eos`: every token that ends the model's answers; else the named token alone."""
        name = self.config.train.stop_token
        if name == "eos":
            return answer_ends(self.tokenizer, model_ends(self.model))
        token = self.tokenizer.get_vocab().get(name)
        if token is None:
            raise ConfigError(
                f"train.stop_token: {name!r} is not a token of this model; use eos, or a token of its vocabulary"
            )
        return (token,)

    @property
    def prompt_budget(self) -> int:
        """Longest prompt in tokens."""
        return prompt_budget(self.config)

    @cached_property
    def asker(self) -> Asker:
        """Prompts of a user's own, as the run's prompts are."""
        train = self.config.train
        thinking = train.enable_thinking if train.is_set("enable_thinking") else None
        return Asker(self.tokenizer, self.config.sources[0], self.train_rows, thinking)

    def _check_settings(self) -> None:
        """Mistakes that can be told without data and models."""
        self.plan  # noqa: B018
        if self.config.rewards:
            RewardSet(self.config.rewards, self.config.train.reward_weights)

    def _prompts(self, source: DatasetConfig) -> Any:
        train = self.config.train
        return tokenize_prompts(
            self.raw_rows(source),
            self.tokenizer,
            source,
            max_prompt_length=self.prompt_budget,
            truncation_mode=source.truncation_mode,
            enable_thinking=train.enable_thinking if train.is_set("enable_thinking") else None,
        )

    def _choose_batches(self, model: Any) -> None:
        """Packed rows where the model can read them so, padded ones else or when `padding_free` is turned off."""
        train = self.config.train
        wanted = train.padding_free if train.is_set("padding_free") else None
        problem = check_packed(model) if wanted is not False else "padding_free is off"
        if problem is None:
            return
        if wanted:
            raise ModelError(f"train.padding_free: {problem}; leave it out")
        self.recorder.note(f"rows are padded: {problem}")
        use_padding(model)

    # Training -------------------------------------------------------------------------------------------------------

    def build_trainer(self) -> Any:
        self._advise()
        for section in self.spec.sections(self.config.train):
            self.recorder.section(**section)
        return super().build_trainer()

    def callbacks(self) -> list[Any]:
        found = [*super().callbacks(), self.engine]
        samples = self.config.logging.sample_logging
        if samples.enabled:
            asked = (
                [self.asker(text) for text in samples.prompts] if samples.prompts is not None else self._first_prompts()
            )
            stops, seed = self.stop_token_ids, self.config.train.seed
            found.append(SampleLogger(samples, asked, self.engine, self.tokenizer, self.recorder, stops, seed))
        return found

    def optimizer_steps(self) -> int:
        train, plan = self.config.train, self.plan
        if train.max_steps is not None:
            return int(train.max_steps)
        return plan.phases(len(self.train_rows), world_size()) * plan.steps * train.epochs

    def stream(self, seed: int | None = None) -> PromptStream:
        """The training prompts in the run's order, or that of `seed`."""
        train = self.config.train
        return PromptStream(
            self.train_rows, seed=train.data_seed if seed is None else seed, phase=self.plan.prompts * world_size(), by_length=train.group_by_length,
            rank=rank(), world=world_size(),
        )  # fmt: skip

    def native_trainer(self, callbacks: Sequence[Any]) -> OnlineTrainer:
        compile_model(self)
        arguments = training_arguments(
            self.config,
            self.directory.checkpoints,
            self.precision,
            max_steps=self.optimizer_steps(),
            remove_unused_columns=False,
        )
        needs = self.spec.needs(self.config.train)
        return self.online_trainer(
            arguments,
            callbacks,
            spec=self.spec,
            rewards=self.rewards,
            stream=self.stream(),
            reference=self.reference if needs.reference else None,
            critic=self._critic() if needs.values else None,
            held_out=self.held_out(),
            eval_dataset=self.eval_rows,
        )

    def online_trainer(
        self, arguments: Any, callbacks: Sequence[Any], *, spec: algorithms.AlgorithmSpec, rewards: RewardSet,
        stream: PromptStream, **parts: Any,
    ) -> OnlineTrainer:  # fmt: skip
        """A trainer of the session's model on its prompts."""
        train = self.config.train
        sampler = Sampler(stream, self.engine, rewards, self.tokenizer, spec, train, self.sampling)
        return OnlineTrainer(
            self.model, arguments, spec=spec, settings=train, plan=self.plan, sampler=sampler,
            processing_class=self.tokenizer, callbacks=list(callbacks), train_dataset=self.train_rows,
            **own_optimizer(self.config, arguments), **parts,
        )  # fmt: skip

    @cached_property
    def reference(self) -> Reference:
        """The frozen reference; first asked for before the policy's first step."""
        return Reference.build(self, self.model)

    def held_out(self) -> HeldOut | None:
        """The evaluation on held-out prompts, or None without any."""
        if self.eval_rows is None:
            return None
        return HeldOut(
            self.eval_rows, self.engine, self.rewards, self.tokenizer, self.greedy, self.recorder, self.eval_batch
        )

    @property
    def eval_batch(self) -> int:
        """Prompts that are answered at a time where answers are only judged."""
        train = self.config.train
        return train.per_device_eval_batch_size if train.is_set("per_device_eval_batch_size") else 64

    def _critic(self) -> Critic:
        model = self.config.model
        if not model.is_set("reward_value_model"):
            return Critic(self.model.config.get_text_config().hidden_size)
        name = model.reward_value_model
        theirs = load_tokenizer(name, trust_remote_code=model.trust_remote_code)
        if theirs.get_vocab() != self.tokenizer.get_vocab():
            raise ModelError(
                f"model.reward_value_model: {name} has another tokenizer than the policy, so it cannot read its completions"
            )
        quantised = model.value_model_quantization
        config = model.model_copy(update={"quantization": quantised})
        trunk = load_model(config, self.precision, trained=not quantised, name=name, init_kwargs={})
        trunk.requires_grad_(not quantised)
        if model.disable_dropout:
            disable_dropout(trunk)
        if check_packed(trunk) is not None:
            use_padding(trunk)
        return Critic(trunk.config.get_text_config().hidden_size, trunk)

    def _advise(self) -> None:
        """Say once what defeats the algorithm or biases its ratio."""
        for sentence in self.spec.advice(self.config.train):
            self.recorder.note(sentence, level="warning")
        if self.sampling.reshapes:
            self.recorder.note(
                "top_p or another truncation or penalty is on: completions come from another distribution than the one that the update "
                "sees; the mismatch is logged as sampler_mismatch. Set top_p to 1 (and no other) for an unbiased ratio",
                level="warning",
            )

    # Before and after -----------------------------------------------------------------------------------------------

    def show_samples(self, step: int) -> None:
        """Greedy answers for the report; evaluations write theirs themselves."""
        if self.eval_rows is not None:
            return
        self.engine.update_weights()  # on every process, since sharded weights are gathered
        if rank() != 0:
            return
        asked = self._first_prompts()
        found = self.engine.generate([ids for _, ids in asked], self.greedy)
        for (prompt, _), tokens in zip(asked, found.completion_ids, strict=True):
            self.recorder.sample(step, {"prompt": prompt, "completion": self._text(tokens)})

    def _first_prompts(self) -> list[tuple[Any, list[int]]]:
        """The first prompts of the evaluation data, else of the training data: (as asked, tokens)."""
        rows = self.eval_rows if self.eval_rows is not None else self.train_rows
        return [(asked_of(row), list(row["prompt_ids"])) for row in rows.select(range(min(SHOWN, len(rows))))]

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    # What a user calls ----------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        held_out = self.held_out()
        if held_out is None:
            raise ConfigError("there is nothing to evaluate on: give eval_dataset or eval_split")
        self.metrics = {f"eval_{name}": value for name, value in held_out(0).items()}
        return self.metrics

    def predict(self, inputs: str | Sequence[Any], *, max_new_tokens: int | None = None) -> list[str]:  # type: ignore[override]
        """Greedy answers. Each input is a text (a user message where prompts are conversations), or a list of messages."""
        asked = [self.asker(item)[1] for item in read_questions(inputs)]
        limit = max_new_tokens or self.config.train.max_completion_length
        params = SamplingParams(max_new_tokens=limit, temperature=0.0, stop_token_ids=self.stop_token_ids, seed=0)
        return [self._text(tokens) for tokens in self.engine.generate(asked, params).completion_ids] if asked else []

    def preview(self, rows: int = 3) -> list[list[Any]]:
        """Tokens of the first prompts; none is trained."""
        first = self.train_rows.select(range(min(rows, len(self.train_rows))))
        return [row_tokens(row["prompt_ids"], [-100] * len(row["prompt_ids"]), self.tokenizer) for row in first]
