"""What can be set for supervised fine-tuning? One class per table of the parameter reference."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from aligntune.config.base import (
    Callback,
    Count,
    Function,
    LoraSettings,
    Named,
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
from aligntune.config.enums import PrecisionType, TaskType
from aligntune.config.optimizers import OPTIMIZERS, SCHEDULES

Attention = Annotated[
    str, OneOf("auto", "flash_attention_2", "flash_attention_3", "varlen", "sdpa", "eager", "flex_attention")
]
LogLevel = Annotated[str, OneOf("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")]
Optimizer = Annotated[str, OneOf(*OPTIMIZERS)]
ScheduleName = Annotated[str, OneOf(*SCHEDULES)]
Strategy = Annotated[str, OneOf("no", "steps", "epoch")]


class ModelConfig(Section):
    """The model that is trained, how it is loaded, and its LoRA adapter."""

    name_or_path: Named
    """Hub name or local path of the model."""
    precision: PrecisionType = PrecisionType.BF16
    """Number format: `bf16`, `fp16` (with a gradient scaler), `fp32`, `auto` (bf16 where it is fast, else fp32). A bf16
    that the device cannot do fast falls to fp32 with one log line."""
    quantization: Settings = {}
    """Fields of transformers' `BitsAndBytesConfig`, e.g. `{load_in_4bit: true}`. Needs the extra `quant`, and LoRA."""
    attn_implementation: Attention = "auto"
    """Attention kernel. `auto`: flash-attention if installed, else torch's varlen kernel (CUDA, sm80+), else sdpa."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a third more time. (Off while unset, if
    `selective_checkpointing` is given.)"""
    compile: bool | None = None
    """Compile the decoder layers (native backend); the first steps then take a quarter of a minute or more. Unset: on a CUDA GPU, for
    language modelling, in runs of at least 250 forward passes (steps x gradient accumulation). (Addition.)"""
    selective_checkpointing: Annotated[str, OneOf("off", "cheap", "half", "mlp")] = "off"
    """What compiled layers recompute in the backward pass: `cheap`, all but matrix products and attention; `half`, also one
    of the two wide products of a gated MLP; `mlp`, both. Between no checkpointing and `gradient_checkpointing`. (Addition.)"""
    max_memory: dict[str | int, str | int] | None = None
    """Memory limit per device for `device_map`, e.g. `{"0": "20GB", "cpu": "60GB"}`."""
    device_map: str | dict[str, Any] | None = "auto"
    """`auto`: one process takes the accelerator if there is one, else the CPU; several processes take one device each.
    Any other value goes to transformers' `from_pretrained`."""
    use_unsloth: bool = False
    """True is `backend: unsloth`; False, when given, keeps `auto` from choosing it."""
    max_seq_length: Count = 2048
    """Longest sequence in tokens; longer rows are cut."""
    peft_enabled: bool = False
    """Train a LoRA adapter instead of all weights."""
    lora_rank: Count = 16
    """Rank of the LoRA matrices."""
    lora_alpha: Count = 32
    """LoRA scale: the update is multiplied by `lora_alpha / lora_rank`."""
    lora_dropout: Share = 0.1
    """Dropout on the input of the LoRA matrices."""
    target_modules: list[str] | str | None = None
    """Modules that get LoRA matrices. Unset: PEFT's choice for the architecture, else all
    linear layers."""
    bias: Annotated[str, OneOf("none", "all", "lora_only")] = "none"
    """Which biases train beside the LoRA matrices."""
    use_gradient_checkpointing: bool = True
    """Synonym of `gradient_checkpointing`."""
    num_labels: Count | None = None
    """Classes of a classification head. Unset: counted from the labels."""
    model_init_kwargs: Settings = {}
    """Further keyword arguments of `from_pretrained`; they may not repeat a setting that has its own name."""

    @property
    def lora(self) -> LoraSettings | None:
        """LoRA, or None for full fine-tuning."""
        if not self.peft_enabled:
            return None
        given = self.target_modules
        return LoraSettings(
            self.lora_rank, self.lora_alpha, self.lora_dropout, given, strict_targets=given is not None, bias=self.bias
        )


class DatasetConfig(Section):
    """The rows that are trained on, and where each part of a row is found."""

    name: Named
    """Hub name, file (JSON, JSONL, CSV, Parquet, CoNLL), folder of files, or `datasets` folder."""
    split: str = "train"
    """Split to read; slices such as `train[:10%]` work for hub data."""
    subset: str | None = None
    """Configuration of a hub dataset."""
    percent: Percent | None = None
    """Share of the rows to use, 0 to 100, drawn under the seed; applied before `max_samples`."""
    max_samples: Count | None = None
    """At most this many rows, drawn under the seed."""
    column_mapping: dict[str, str] = {}
    """Source column -> canonical column. If no key is a column but every value is, it is read
    the other way round."""
    task_type: TaskType = TaskType.SUPERVISED_FINE_TUNING
    """What the rows teach: see the page on tasks."""
    auto_detect_fields: bool = False
    """Look for the parts of a row under the usual column names of all known formats, not only under the configured
    `*_column` names."""
    format_type: str | None = None
    """Name of the row format (`alpaca`, `dolly`, `sharegpt`, `messages`, `prompt_completion`, `text`, ...). Unset: found from
    the columns and the first rows."""
    text_column: str = "text"
    """Column of raw text, and of the text to classify."""
    instruction_column: str = "instruction"
    """Column of the instruction."""
    response_column: str = "response"
    """Column of the response in formats that call it so (dolly)."""
    output_column: str = "output"
    """Column of the response in formats that call it output (alpaca)."""
    input_column: str = "input"
    """Column of an optional input that follows the instruction (alpaca)."""
    context_column: str = "context"
    """Column of an optional context that follows the instruction (dolly)."""
    label_column: str = "label"
    """Column of the class for text classification."""
    tokens_column: str = "tokens"
    """Column of the words for token classification."""
    tags_column: str = "ner_tags"
    """Column of one tag per word for token classification."""
    messages_column: str = "messages"
    """Column of chat messages."""
    dataset_text_field: str = "text"
    """Synonym of `text_column`."""
    chat_template: str | None = None
    """A Jinja string, a file, or the name of a shipped template; saved with the model. Unset: the tokenizer's own."""
    dataset_num_proc: Count | None = None
    """Processes that prepare the rows."""
    pad_token: str | None = None
    """Token used for padding. Unset: the tokenizer's, else a reserved or new token that is not the end-of-sequence token."""
    preserve_columns: list[str] | None = None
    """Source columns kept beside the tokens (for metrics and samples)."""
    processing_fn: Function | None = None
    """Function applied to every row (or batch) before the format is looked for: a callable or `module:function`. The columns that
    it returns are added to the row, and other columns stay: where those fit a format too, name yours by `format_type`. What it
    returns for a batch takes the batch's place."""
    processing_batched: bool = False
    """Whether `processing_fn` takes a batch (a dict of lists)."""
    processing_fn_kwargs: Settings = {}
    """Keyword arguments of `processing_fn`."""
    weight: Rate = 1.0
    """Share of this dataset when several are mixed, relative to the others' weights. (Addition to the reference's table.)"""
    streaming: bool = False
    """Read rows while training instead of before it, for data larger than memory; needs `max_steps`. (Addition.)"""
    system_prompt: str | None = None
    """System message put before conversations that have none. (Addition.)"""


class TrainingConfig(Section):
    """Optimiser, schedule, batches and loss of supervised fine-tuning."""

    per_device_batch_size: Count = 1
    """Rows per device and forward pass."""
    gradient_accumulation_steps: Count = 1
    """Forward passes per optimiser step."""
    micro_batch_tokens: Count | None = None
    """Most tokens of one forward and backward pass: a batch that holds more is cut into passes, between rows (a longer row is a
    pass of its own). The optimiser step stays what `per_device_batch_size` and `gradient_accumulation_steps` say, and so does its
    loss: only memory and speed change. Native backend. (Addition.)"""
    max_steps: Count | None = None
    """Optimiser steps; set, it wins over `epochs`."""
    epochs: Count = 3
    """Passes over the data."""
    learning_rate: Rate = 1e-5
    """Peak learning rate."""
    weight_decay: Weight = 0.01
    """Decoupled weight decay (not on biases and norms)."""
    warmup_steps: Size = 0
    """Steps of linear warm-up; above 0 it wins over `warmup_ratio`."""
    warmup_ratio: Share = 0.1
    """Share of all steps spent on warm-up."""
    eval_interval: Count = 100
    """Steps between evaluations."""
    save_interval: Count = 500
    """Steps between checkpoints."""
    max_grad_norm: Weight = 1.0
    """Gradients are scaled down to this norm; 0 turns clipping off."""
    fp16: bool = False
    """Synonym: True is `precision: fp16`."""
    bf16: bool = False
    """Synonym: True is `precision: bf16`; False, when given, means not bf16."""
    dataloader_num_workers: Size = 0
    """Processes that collate batches ahead of the step."""
    remove_unused_columns: bool = False
    """Drop every column but the model's inputs. False keeps `preserve_columns`."""
    optimizer: Optimizer = "adamw_torch"
    """Optimiser, by transformers' names but GaLore's and APOLLO's (on a GPU the default is its fused kernel), or of our own on the native backend:
    `adamw_split`, bfloat16 weights with exact float32 masters in 14 bytes a weight for 16, gradient included;
    `adamw_split_bf16`, moments in bfloat16 too, rounded stochastically: 10 bytes."""
    lr_scheduler: ScheduleName = "cosine"
    """Learning-rate schedule, by transformers' names. `reduce_lr_on_plateau` and `greedy` go by `metric_for_best_model`."""
    group_by_length: bool = False
    """Batches of rows of like length: less padding."""
    dataloader_drop_last: bool = False
    """Drop the last batch of training rows when it is not full."""
    eval_accumulation_steps: Count | None = None
    """Evaluation steps kept on the device before results move to the CPU (classification)."""
    label_smoothing_factor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing: this share of the target mass is spread over all classes or tokens."""
    early_stopping_patience: Count | None = None
    """Stop after this many evaluations without an improvement of `metric_for_best_model`; needs evaluation data."""
    early_stopping_threshold: Weight = 0.0
    """Least change that counts as an improvement."""
    load_best_model_at_end: bool = True
    """Keep the weights of the best evaluation; off, with one log line, when there is no evaluation data."""
    metric_for_best_model: str = "eval_loss"
    """Metric that says which evaluation is best."""
    greater_is_better: bool = False
    """Whether a higher `metric_for_best_model` is better."""
    use_trl: bool = False
    """True is `backend: trl`; False, when given, keeps `auto` from choosing it."""
    dataset_num_proc: Count | None = None
    """Synonym of the dataset section's `dataset_num_proc`."""
    dataset_kwargs: Settings = {}
    """Keyword arguments of `datasets.load_dataset` (e.g. `{revision: main, data_files: ...}`)."""
    packing: bool = False
    """Put several rows into one sequence of `max_seq_length` tokens."""
    packing_strategy: Annotated[str, OneOf("bfd", "wrapped")] = "bfd"
    """`bfd`: best-fit decreasing, no attention between rows (arXiv 2404.10830). `wrapped`: one stream cut into equal pieces,
    which cuts rows."""
    eval_packing: bool | None = None
    """Packing of the evaluation rows. Unset: as `packing`."""
    padding_free: bool = False
    """Concatenate the rows of a batch instead of padding them; loss and gradients are those of the padded batch."""
    pad_to_multiple_of: Count | None = None
    """Pad sequences to a multiple of this many tokens."""
    completion_only_loss: bool | None = None
    """Train on the completion only. Unset: True for prompt-completion data, else False."""
    assistant_only_loss: bool = False
    """Train on the assistant's turns only (end-of-turn token included)."""
    loss_type: Annotated[str, OneOf("nll", "dft")] = "nll"
    """`nll`: cross-entropy. `dft`: each token's cross-entropy times its own probability, detached (arXiv 2508.05629)."""
    loss_function: Function | None = None
    """Native: a loss of your own in place of `loss_type`, `fn(log_probs) -> losses`: of each trained token, from its
    log-probability. A callable, `module:function` or `file.py:function`. (Addition.)"""
    callbacks: list[Callback] | None = None
    """`TrainerCallback`s of transformers that the trainer calls too: objects, classes, or `file.py:Class`. (Addition.)"""
    activation_offloading: bool = False
    """Keep activations in CPU memory between forward and backward (GPU only). Layers are not compiled then."""
    use_flash_attention_2: bool | None = None
    """Synonym: True is `attn_implementation: flash_attention_2`; False rules it out."""
    gradient_checkpointing: bool = False
    """Synonym of the model section's `gradient_checkpointing`, which decides while both are unset."""
    gradient_checkpointing_kwargs: Settings = {}
    """Arguments of the checkpointing function, e.g. `{use_reentrant: false}`."""
    seed: Seed = 42
    """Seed of weights, dropout and data order. (Addition, as in the RL table.)"""
    data_seed: Seed | None = None
    """Seed of sampling and data order alone. Unset: `seed`. (Addition.)"""
    save_total_limit: Count | None = None
    """Checkpoints kept, the best one included. (Addition, as in the RL table.)"""
    use_liger_kernel: bool = False
    """Liger's fused kernels; needs the extra `liger` and a GPU. (Addition, as in the RL table.)"""


class EvaluationConfig(Section):
    """Which metrics are computed on the evaluation rows."""

    compute_perplexity: bool = True
    """exp of the token-weighted mean loss."""
    compute_rouge: bool = True
    """ROUGE-1, ROUGE-2, ROUGE-L F-measures of greedy answers."""
    compute_bleu: bool = True
    """Corpus BLEU of greedy answers by sacrebleu."""
    compute_meteor: bool = False
    """METEOR of greedy answers: exact and stem matches, synonyms where WordNet is installed."""
    compute_bertscore: bool = False
    """BERTScore F1 with `bertscore_model`."""
    compute_semantic_similarity: bool = False
    """Cosine similarity of sentence embeddings by `semantic_similarity_model`."""
    compute_codebleu: bool = False
    """CodeBLEU of greedy answers (extra `eval`)."""
    custom_metrics: list[Function] | None = None
    """Functions `fn(predictions, references, **columns) -> dict`, or their `module:function` addresses."""
    max_samples_for_quality_metrics: Count = 50
    """Evaluation rows that are answered for the metrics that need answers."""
    bertscore_model: Text = "microsoft/deberta-xlarge-mnli"
    """Encoder for BERTScore, hub name or path."""
    semantic_similarity_model: Text = "sentence-transformers/all-MiniLM-L6-v2"
    """Encoder for semantic similarity, hub name or path."""
    max_new_tokens: Count = 128
    """Longest answer generated for a metric, in tokens. (Addition.)"""


class LoggingConfig(Section):
    """Where results go and how often."""

    output_dir: Named = "./output"
    """Folder of the run: config, metrics, samples, checkpoints, model and report."""
    run_name: str | None = None
    """Name of the run in loggers and report. Unset: the folder's name."""
    loggers: list[str] | str = ["tensorboard"]
    """Loggers beside the JSONL files that are always written: `tensorboard`, `wandb`, `trackio`, `mlflow`, `none`."""
    log_level: LogLevel = "INFO"
    """Least severe log message shown."""
    log_interval: Count = 10
    """Steps between log lines."""
    save_strategy: Strategy = "steps"
    """When checkpoints are written: `no`, `steps`, `epoch`."""
    eval_strategy: Strategy = "steps"
    """When evaluation runs while training: `no`, `steps`, `epoch`. At the end it always runs, if there is evaluation data."""
    report_to: list[str] | str = "none"
    """Synonym of `loggers`."""
