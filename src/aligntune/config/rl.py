"""What can be set for every RL alignment run? One class per table of the parameter reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from aligntune.config.base import (
    Callback,
    Count,
    Function,
    LoraSettings,
    Named,
    Number,
    OneOf,
    Percent,
    Rate,
    Section,
    Seed,
    Settings,
    Share,
    Size,
    Text,
    Weight,
)
from aligntune.config.enums import PrecisionType
from aligntune.config.rewards import RewardModelSourceConfig
from aligntune.config.sft import Attention, LogLevel, Optimizer, ScheduleName, Strategy

TruncationMode = Annotated[str, OneOf("keep_end", "keep_start")]


class ModelConfig(Section):
    """The policy, its reference, and the reward and value models."""

    name_or_path: Named
    """Hub name or local path of the policy."""
    sft_path: Text | None = None
    """Fine-tuned weights (full or adapter) that policy and reference start from; `name_or_path` then gives tokenizer and
    architecture."""
    reward_path: Text | None = None
    """Folder of the reward model."""
    reward_model_name: str | None = None
    """Hub name of the reward model."""
    reward_model_source: RewardModelSourceConfig | None = None
    """The reward model in full: pretrained, or trained first."""
    precision: PrecisionType = PrecisionType.AUTO
    """Number format: `bf16`, `fp16`, `fp32`, `auto` (bf16 where it is fast, else fp32)."""
    quantization: Settings = {}
    """Fields of transformers' `BitsAndBytesConfig` for the policy, e.g. `{load_in_4bit: true}`."""
    attn_implementation: Attention = "auto"
    """Attention kernel. `auto`: flash-attention if installed, else torch's varlen kernel (CUDA, sm80+), else sdpa."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    compile: bool | None = None
    """Compile the decoder layers (native backend); the first steps then take a quarter of a minute or more. Unset: on a CUDA GPU, for
    online algorithms that train all weights (not Meta-ES), in runs of at least 250 steps x gradient accumulation. (Addition.)"""
    selective_checkpointing: Annotated[str, OneOf("off", "cheap", "half", "mlp")] = "off"
    """What compiled layers recompute in the backward pass: `cheap`, all but matrix products and attention; `half`, also one
    of the two wide products of a gated MLP; `mlp`, both. Between no checkpointing and `gradient_checkpointing`. (Addition.)"""
    max_memory: dict[str | int, str | int] | None = None
    """Memory limit per device for `device_map`."""
    device_map: str | dict[str, Any] | None = None
    """Unset: the process's accelerator if there is one, else the CPU. Any other value goes to `from_pretrained`."""
    use_unsloth: bool = False
    """True is `backend: unsloth`; False, when given, keeps `auto` from choosing it."""
    max_seq_length: Count = 2048
    """Bound on prompt and completion together, in tokens."""
    reward_value_model: Text = "meta-llama/Llama-3.2-1B-Instruct"
    """Value model of PPO. Unset: a value head on the policy's own base (the default names a gated model of another family,
    so it is only used when given)."""
    reward_value_loading_type: Annotated[str, OneOf("standard", "unsloth")] | None = None
    """Who loads the value and reward models: transformers (`standard`) or `unsloth`. Unset: standard."""
    reward_model_quantization: Settings = {}
    """`BitsAndBytesConfig` fields for the reward model."""
    value_model_quantization: Settings = {}
    """`BitsAndBytesConfig` fields for the value model."""
    use_peft: bool = True
    """Train a LoRA adapter instead of all weights."""
    lora_r: Count = 16
    """Rank of the LoRA matrices."""
    lora_alpha: Count = 32
    """LoRA scale: the update is multiplied by `lora_alpha / lora_r`."""
    lora_dropout: Share = 0.05
    """Dropout on the input of the LoRA matrices; acts while `disable_dropout` is False."""
    lora_target_modules: list[str] | str = ["q_proj", "k_proj", "v_proj", "o_proj"]
    """Modules that get LoRA matrices. While unset, an architecture without these modules gets
    PEFT's choice."""
    trust_remote_code: bool = False
    """Run the model repository's own code. The reference says True; here it is False, because it runs code that nobody
    has read."""
    model_init_kwargs: Settings = {}
    """Further keyword arguments of `from_pretrained` for the policy."""
    ref_model_init_kwargs: Settings = {}
    """Keyword arguments of `from_pretrained` for a separate reference model."""
    model_adapter_name: str | None = None
    """Name of the PEFT adapter that is trained."""
    ref_adapter_name: str | None = None
    """Name of the PEFT adapter that is the reference."""
    force_use_ref_model: bool = False
    """Keep a separate frozen reference even where LoRA would allow disabling the adapter."""
    disable_dropout: bool = True
    """Turn all dropout off, so that log-probabilities of policy and reference compare."""
    use_logits_to_keep: bool = False
    """Compute logits of completion positions only. The native trainer always does; TRL too since 0.29, where False cannot be
    had."""
    reward_device: Annotated[str, OneOf("auto", "cpu", "cuda")] = "auto"
    """Device of the reward model; `auto` is the policy's."""

    @property
    def lora(self) -> LoraSettings | None:
        """LoRA, or None for full fine-tuning."""
        if not self.use_peft:
            return None
        dropout = 0.0 if self.disable_dropout else self.lora_dropout
        named = self.is_set("lora_target_modules")
        return LoraSettings(self.lora_r, self.lora_alpha, dropout, self.lora_target_modules, strict_targets=named)


class DatasetConfig(Section):
    """The prompts or preference pairs, and how they are read."""

    name: Named
    """Hub name, file, folder, or `reasoning_gym:TASK`."""
    split: str = "train"
    """Split to read."""
    percent: Percent | None = None
    """Share of the rows to use, 0 to 100, drawn under the seed; applied before `max_samples`."""
    max_samples: Count | None = None
    """At most this many rows, drawn under the seed."""
    field_mappings: dict[str, str] = {}
    """Source column -> canonical column."""
    format_type: str | None = None
    """Name of the row format. Unset: found from the columns and the first rows."""
    auto_detect_fields: bool = True
    """Look for the parts of a row under the usual column names of all known formats."""
    column_mapping: dict[str, str] = {}
    """Synonym of `field_mappings`."""
    task_type: Annotated[str, OneOf("conversation", "text")] = "conversation"
    """`conversation`: prompts go through the chat template. `text`: prompts are used as they are."""
    weight: Rate = 1.0
    """Share of this dataset when several are mixed, relative to the others' weights."""
    chat_template: str | None = None
    """A Jinja string, a file, or the name of a shipped template; saved with the model."""
    system_prompt: str | None = None
    """System message put before every prompt that has none."""
    dataset_num_proc: Count | None = None
    """Processes that prepare the rows."""
    pad_token: str | None = None
    """Token used for padding. Unset: the tokenizer's, else one that is not the end-of-sequence token."""
    label_pad_token_id: Annotated[int, Field(le=-100, ge=-100)] = -100
    """Label of tokens without a loss: -100, which torch's cross-entropy ignores; any other value is refused."""
    truncation_mode: TruncationMode = "keep_end"
    """Which side of a prompt over the budget stays: `keep_end` or `keep_start`."""
    padding_free: bool = False
    """Synonym of the training section's `padding_free`."""
    precompute_ref_log_probs: bool = False
    """DPO: compute the reference's log-probabilities once, before training, and free the reference."""
    precompute_ref_batch_size: Count | None = None
    """Pairs per forward pass of that computation. Unset: the evaluation batch size."""
    tools: Any = None
    """Tools given to the chat template: a list of JSON schemas or callables."""
    preserve_columns: list[str] | None = None
    """Columns kept for rewards and metrics. Unset: all of them."""
    processing_fn: Function | None = None
    """Function applied to every row (or batch) first: a callable or `module:function`."""
    processing_batched: bool = False
    """Whether `processing_fn` takes a batch (a dict of lists)."""
    processing_fn_kwargs: Settings = {}
    """Keyword arguments of `processing_fn`."""
    config_name: str | None = None
    """Configuration of a hub dataset."""


class TrainingConfig(Section):
    """Optimiser, schedule, rollouts and loss. Settings that an algorithm does not use are refused there."""

    own_defaults: ClassVar[Mapping[str, tuple[Any, str]]] = {}
    """Setting -> (value, why): what an algorithm has in place of the default below, once a run is resolved."""

    per_device_batch_size: Count = 1
    """Per device and forward pass: pairs (DPO) or completions (online algorithms)."""
    per_device_eval_batch_size: Count = 1
    """The same for evaluation."""
    gradient_accumulation_steps: Count = 1
    """Forward passes per optimiser step."""
    micro_batch_tokens: Count | None = None
    """Most tokens of one forward and backward pass: a batch that holds more is cut into passes, between rows (a longer row is a
    pass of its own). The optimiser step stays what `per_device_batch_size` and `gradient_accumulation_steps` say, and so does its
    loss: only memory and speed change. Native backend. (Addition.)"""
    max_steps: Count | None = None
    """Optimiser steps; set, it wins over `epochs`."""
    epochs: Count | None = None
    """Passes over the prompts or pairs. With `max_steps` unset too: one."""
    eval_interval: Count = 100
    """Steps between evaluations."""
    save_interval: Count = 500
    """Steps between checkpoints."""
    learning_rate: Rate = 1e-5
    """Peak learning rate."""
    max_grad_norm: Weight = 1.0
    """Gradients are scaled down to this norm; 0 turns clipping off."""
    weight_decay: Weight = 0.01
    """Decoupled weight decay."""
    optimizer: Optimizer = "adamw_torch"
    """Optimiser, by transformers' names but GaLore's and APOLLO's (on a GPU the default is its fused kernel), or of our own on the native backend:
    `adamw_split`, bfloat16 weights with exact float32 masters in 14 bytes a weight for 16, gradient included;
    `adamw_split_bf16`, moments in bfloat16 too, rounded stochastically: 10 bytes."""
    lr_scheduler: ScheduleName = "cosine"
    """Learning-rate schedule, by transformers' names. `reduce_lr_on_plateau` and `greedy` go by `metric_for_best_model`."""
    warmup_steps: Size = 0
    """Steps of linear warm-up; above 0 it wins over `warmup_ratio`."""
    warmup_ratio: Share = 0.0
    """Share of all steps spent on warm-up."""
    rollout_batch_size: Count = 1
    """Prompts per rollout phase and device. Unset: exactly what one optimiser step consumes (on-policy)."""
    kl_coef: Weight = 0.1
    """Weight of the KL divergence to the reference: in the reward (PPO) or in the loss (GRPO family). 0: no reference."""
    cliprange: Rate = 0.2
    """Clip range of the probability ratio, both sides."""
    cliprange_high: Rate | None = None
    """Upper side alone. Unset: `cliprange` (DAPO: 0.28). (Addition.)"""
    cliprange_value: Rate = 0.2
    """Clip range of the value function (PPO)."""
    num_ppo_epochs: Count | None = None
    """Passes over each rollout. Unset: 4 for PPO, 1 for the GRPO family."""
    temperature: Rate = 0.6
    """Sampling temperature; log-probabilities of the update are those of the tempered distribution."""
    whiten_rewards: bool = False
    """PPO: divide the token rewards by their standard deviation (the mean stays)."""
    kl_estimator: Annotated[str, OneOf("k1", "k2", "k3")] = "k1"
    """KL estimator from samples: k1 = d, k2 = d^2/2, k3 = exp(-d) - 1 + d with d = log p - log p_ref. GRPO family: while
    unset, k3."""
    vf_coef: Weight = 0.1
    """Weight of the value loss (PPO)."""
    gamma: Share = 1.0
    """Discount factor (PPO)."""
    lam: Share = 0.95
    """Lambda of generalised advantage estimation (PPO)."""
    response_length: Count = 128
    """PPO: longest completion in tokens, while `max_completion_length` is unset. Elsewhere a synonym of that."""
    stop_token: str = "eos"
    """Token that ends a completion: `eos` or a token of the vocabulary."""
    missing_eos_penalty: Weight = 1.0
    """PPO: taken from the score of a completion without the stop token."""
    ds3_gather_for_generation: bool = True
    """DeepSpeed ZeRO-3: gather the shards for generation; setting it without ZeRO-3 is an error."""
    generation_kwargs: Settings | None = None
    """Further sampling settings: `top_k`, `min_p`, `repetition_penalty`, ..."""
    max_length: Count = 1024
    """DPO: longest prompt and completion together, in tokens."""
    max_prompt_length: Count = 512
    """Longest prompt in tokens."""
    max_target_length: Count | None = None
    """DPO: longest completion in tokens."""
    max_completion_length: Count = 256
    """Longest completion in tokens."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Nucleus sampling. Below 1 the sampler's distribution is not the policy's: the mismatch is logged."""
    padding_free: bool = False
    """Concatenate the rows of a batch instead of padding them."""
    truncation_mode: TruncationMode = "keep_end"
    """Synonym of the dataset section's `truncation_mode`."""
    beta: Weight = 0.1
    """DPO: inverse temperature. GRPO family: a synonym of `kl_coef` when given."""
    loss_type: str | None = None
    """DPO: name of the loss. GRPO family: how token losses are summed (`grpo`, `dapo`, `dr_grpo`)."""
    loss_function: Function | None = None
    """Native: a loss of your own, `fn(batch, config, normalizers) -> Loss`, in place of the algorithm's: a callable,
    `module:function` or `file.py:function`. The batch holds what the settings ask for (the reference's log-probabilities with
    `kl_coef` above 0, entropy with `grpo_alpha`). (Addition.)"""
    advantage_function: Function | None = None
    """Native: advantages of your own, `fn(rollouts, config, all_sum) -> Advantages`, in place of the algorithm's. (Addition.)"""
    callbacks: list[Callback] | None = None
    """`TrainerCallback`s of transformers that the trainer calls too: objects, classes, or `file.py:Class`. (Addition.)"""
    loss_weights: dict[str, Weight] | None = None
    """DPO: several losses by weight, e.g. `{sigmoid: 0.8, bco_pair: 0.2, sft: 1.0}` (MPO, arXiv 2411.10442)."""
    f_divergence_type: Annotated[str, OneOf("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")] = (
        "reverse_kl"
    )
    """DPO: divergence to the reference (f-DPO, arXiv 2309.16240)."""
    f_alpha_divergence_coef: Number = 1.0
    """Alpha of `alpha_divergence`, as in the f-DPO paper: 1 is forward KL, towards 0 reverse KL."""
    reference_free: bool = False
    """DPO against a uniform reference."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """DPO: probability that a preference label is wrong (cDPO for `sigmoid`)."""
    use_weighting: bool = False
    """DPO: weigh pairs by their probability under the policy (WPO, arXiv 2406.11827)."""
    rpo_alpha: Weight | None = None
    """DPO: weight of the chosen answers' token-mean negative log-likelihood (RPO, arXiv 2404.19733)."""
    ld_alpha: Share | None = None
    """DPO: weight of the tokens beyond the shorter answer's length (LD-DPO, arXiv 2409.06411)."""
    discopop_tau: Rate = 0.05
    """Temperature of the `discopop` loss (arXiv 2406.08414)."""
    sync_ref_model: bool = False
    """Move the reference towards the policy while training (TR-DPO, arXiv 2404.09656)."""
    ref_model_mixup_alpha: Share = 0.6
    """The policy's share in each synchronisation."""
    ref_model_sync_steps: Count = 512
    """Optimiser steps between synchronisations."""
    grpo_alpha: Weight = 0.1
    """GRPO family: coefficient of an entropy bonus, applied only when given. (No paper defines the name.)"""
    grpo_beta: Weight = 0.1
    """GRPO family: synonym of `kl_coef`."""
    gspo_gamma: Rate = 0.1
    """GSPO: left clip range, applied when given, else `cliprange`. Paper: 3e-4."""
    gspo_delta: Rate = 0.1
    """GSPO: right clip range, applied when given, else `cliprange`. Paper: 4e-4."""
    eval_steps: Count = 100
    """Synonym of `eval_interval`."""
    eval_strategy: Strategy = "no"
    """When evaluation runs while training: `no`, `steps`, `epoch`. At the end it always runs, if there is evaluation data."""
    save_steps: Count = 500
    """Synonym of `save_interval`."""
    save_strategy: Strategy = "steps"
    """When checkpoints are written: `no`, `steps`, `epoch`."""
    save_total_limit: Count | None = None
    """Checkpoints kept, the best one included."""
    load_best_model_at_end: bool = False
    """Keep the weights of the best evaluation."""
    metric_for_best_model: str | None = None
    """Metric that says which evaluation is best. Unset: reward accuracy (DPO) or mean reward."""
    greater_is_better: bool = False
    """Whether a higher `metric_for_best_model` is better."""
    logging_steps: Count = 10
    """Steps between log lines."""
    logging_strategy: Strategy = "steps"
    """When log lines are written: `no`, `steps`, `epoch`."""
    num_generations: Count | None = None
    """Completions per prompt. Unset: `per_device_batch_size` when that is at least 2, else 8."""
    mask_truncated_completions: bool = True
    """Completions that did not end carry no loss. PPO: false while unset, so that they learn from `missing_eos_penalty`."""
    scale_rewards: Annotated[str, OneOf("group", "batch", "none")] = "group"
    """Advantages divided by the standard deviation of their group, of the batch, or not at all. Dr. GRPO: none while unset."""
    reward_weights: list[Weight] | None = None
    """One weight per reward function."""
    enable_thinking: bool = False
    """Passed to chat templates that take it (Qwen3)."""
    fast_inference: bool = False
    """Rollouts by vLLM (extra `vllm`)."""
    vllm_gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Share of GPU memory that vLLM takes."""
    seed: Seed = 42
    """Seed of weights, dropout and sampling."""
    data_seed: Seed = 47
    """Seed of data order and of drawing rows."""
    use_liger_kernel: bool = False
    """Liger's fused kernels (extra `liger`, GPU)."""
    use_liger_loss: bool | None = None
    """Liger's fused loss (extra `liger`, GPU)."""
    gradient_checkpointing_kwargs: Settings = {"use_reentrant": False}
    """Arguments of the checkpointing function."""
    group_by_length: bool = True
    """Batches of rows of like length; online algorithms group their prompts."""

    @classmethod
    def default_of(cls, name: str) -> Any:
        """What `name` is while unset: the algorithm's own default, else the common one."""
        return cls.own_defaults[name][0] if name in cls.own_defaults else cls.model_fields[name].default


class SampleLoggingConfig(Section):
    """Answers written while training, to see what the model says."""

    enabled: bool = False
    """Write samples."""
    prompts: list[str] | None = None
    """Prompts to answer. Unset: the first prompts of the evaluation data, else of the training data."""
    interval_steps: Count | None = None
    """Steps between samples."""
    percent_of_max_steps: Annotated[float, Field(gt=0, le=1)] | None = None
    """The same as a share of the run; both may be set."""
    max_new_tokens: Count = 80
    """Longest sample in tokens."""
    temperature: Weight = 0.6
    """Sampling temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Nucleus sampling."""
    num_samples: Count = 3
    """Samples per prompt."""


class LoggingConfig(Section):
    """Where results go."""

    loggers: list[str] | str = ["tensorboard"]
    """Loggers beside the JSONL files that are always written: `tensorboard`, `wandb`, `trackio`, `mlflow`, `none`."""
    run_name: str | None = None
    """Name of the run in loggers and report. Unset: the folder's name."""
    output_dir: Named = "./output"
    """Folder of the run: config, metrics, samples, checkpoints, model and report."""
    log_level: LogLevel = "INFO"
    """Least severe log message shown."""
    sample_logging: SampleLoggingConfig = SampleLoggingConfig()
    """Answers written while training."""
    report_to: list[str] | str = "none"
    """Synonym of `loggers`."""
