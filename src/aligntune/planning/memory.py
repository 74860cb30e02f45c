"""How much GPU memory does a training step take? Every formula of the plan, to be checked with a pencil.

Letters: N parameters, of which Nt are trained; n layers, each with m parameters in matrices; H hidden, I inner, V vocabulary;
Q and K widths of all query and all key heads; T tokens of a forward pass (padding included), M of them predicted, L tokens of
the longest row. c bytes of the compute format (2 or 4), t of trained weights (4: float32 masters), r of the residual stream
(t when weights are trained under autocast, else c).

A step has four moments, and each is a sum of lines (`moments`); the peak is the largest. The counts of saved activations are
what autograd saves for transformers' Llama-like layers; `tests/planning/test_memory_model.py` holds them to that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from aligntune.config.base import LoraSettings
from aligntune.config.compiling import Keep
from aligntune.planning.shapes import Shape

GIB = 2**30
CHUNK = 2**30
"""Bytes of float32 logits that our head holds at a time (`models.kernels.linear_loss.CHUNK_BYTES`)."""
TILE = (4096, 32_768)
"""Tokens x vocabulary of the logits that TRL's fused head holds (`trl.kernels.chunked_logprob`)."""
PREFILL = 16_384
"""Prompt tokens that the rollout engine reads in one pass (`rollouts.graph.PREFILL_TOKENS`)."""
CONTEXT = 0.6 * GIB
"""What CUDA, cuBLAS and their kernels take outside torch's allocator: an allowance, since it depends on card and driver."""
SLACK = 0.05
"""Share of torch's peak that lies in blocks too small to use: an allowance, since it depends on the order of the lengths."""

OPTIMIZERS: dict[str, tuple[float, float]] = {
    "adamw_torch": (2, 1), "adamw_torch_fused": (2, 0), "adamw_anyprecision": (1.5, 0),
    "adamw_8bit": (0.508, 0), "adamw_bnb_8bit": (0.508, 0), "paged_adamw_8bit": (0, 0), "paged_adamw_32bit": (0, 0),
    "adafactor": (0.01, 0), "sgd": (0, 1), "lion_32bit": (1, 0), "lion_8bit": (0.254, 0), "paged_lion_32bit": (0, 0),
    "paged_lion_8bit": (0, 0), "adagrad": (1, 0), "rmsprop": (1, 0), "rmsprop_bnb": (1, 0), "rmsprop_bnb_8bit": (0.254, 0),
    "adamw_torch_8bit": (0.508, 0), "adamw_torch_4bit": (0.258, 0), "adamw_split": (5, 0), "adamw_split_bf16": (3, 0),
}  # fmt: skip
"""(state, temporary) as multiples of the trained weights' bytes. Adam keeps two moments; torch's unfused one also makes their
square roots for all weights at once. 8 bits: one byte a number and a float32 for each 256. Paged states lie in host memory.
Split: beside bfloat16 weights a rest of 2 bytes, and two moments of 4 or 2 bytes."""
EIGHT_BIT = {"adamw_8bit": 2, "adamw_bnb_8bit": 2, "lion_8bit": 1, "rmsprop_bnb_8bit": 1}
"""Numbers per weight of bitsandbytes' optimisers, which transformers keeps in float32 for embeddings."""

Quantised = Literal["4bit", "4bit double", "8bit"]
MATRIX_BYTES: dict[str, float] = {"4bit": 0.5 + 4 / 64, "4bit double": 0.5 + 1 / 64 + 4 / (64 * 256), "8bit": 1.0}
"""Bytes per parameter of a quantised matrix: the number, and one scale for each block of 64 (float32, or 8 bits)."""

EVERY = {"cheap": 1, "half": 2, "mlp": 0}
"""Of the wide products of a layer (result more than twice as wide as the input) every which one is kept; 0: none."""

Head = Literal["loss", "log_probs", "tiles", "full", "none"]
"""`loss` and `log_probs`: ours, in chunks (`linear_loss`). `tiles`: TRL's. `full`: a [tokens, vocabulary] tensor. `none`: a
classifier's, which is small."""


@dataclass(frozen=True)
class Batch:
    """One forward pass with gradient."""

    tokens: int
    """Positions that are computed, padding included."""
    predicted: int
    """Positions whose loss or log-probability is taken."""
    longest: int
    """Tokens of the longest row; with a mask, of the whole row that it spans."""
    masked: bool = False
    """Whether attention gets a mask (padded rows, or packed rows under transformers' own sdpa): it is saved in every layer."""
    cut_from: int | None = None
    """Tokens of the micro-batch, where `micro_batch_tokens` cuts it into several passes."""

    @property
    def micro(self) -> int:
        """Tokens of the micro-batch."""
        return self.tokens if self.cut_from is None else self.cut_from


@dataclass(frozen=True)
class Rollout:
    """What the rollout engine keeps between phases: keys and values, and the logits of a step."""

    rows: int
    length: int
    """Tokens of prompt and completion."""
    prompt_tokens: int
    """Tokens of all prompts of a phase."""


@dataclass(frozen=True)
class Training:
    """What decides the memory of a training step."""

    shape: Shape
    batch: Batch
    head: Head
    lora: LoraSettings | None = None
    compute: int = 2
    trained: int = 4
    quantised: Quantised | None = None
    optimizer: str = "adamw_torch"
    checkpointing: bool = False
    compiled: Keep | None = None
    """What compiled layers keep; None: layers are not compiled."""
    accumulates: bool = False
    bucketed: bool = False
    """Whether gradients lie in DDP's buckets, which stay from step to step."""
    eager: bool = False
    repeats_keys: bool = False
    """Whether keys and values are copied to all query heads (torch's varlen kernel before 2.12; sdpa with a mask)."""
    frozen: dict[str, float] = field(default_factory=dict)
    """Bytes of further models that are not trained, by what they are."""
    value: Shape | None = None
    """A value model with a trunk of its own, trained in full."""
    rollout: Rollout | None = None
    weight_shards: int = 1
    """Processes that share weights (FSDP2, ZeRO-3)."""
    state_shards: int = 1
    """Processes that share gradients and optimiser states (also ZeRO-2)."""

    @property
    def full(self) -> bool:
        return self.lora is None

    @property
    def recomputes(self) -> bool:
        """Whether the backward pass of a layer begins by computing a part of it again."""
        return self.checkpointing or self.compiled in EVERY

    @property
    def mixed(self) -> bool:
        """Autocast over weights of another format."""
        return self.full and self.trained != self.compute

    @property
    def residual(self) -> int:
        """r: that of the embedding, which PEFT turns into float32 beside quantised matrices."""
        if self.quantised is not None:
            return 4
        return self.trained if self.full else self.compute

    @property
    def trained_parameters(self) -> int:
        """Nt."""
        return self.shape.parameters if self.lora is None else self.shape.adapter_parameters(self.lora)


def peak(training: Training) -> float:
    """Bytes of the largest moment, as `torch.cuda.max_memory_allocated` counts them."""
    return max(sum(lines.values()) for lines in moments(training).values())


def needed(allocated: float) -> float:
    """Bytes that the card must have free for a peak of `allocated`."""
    return CONTEXT + allocated * (1 + SLACK)


def moments(t: Training) -> dict[str, dict[str, float]]:
    """Moment -> line -> bytes."""
    s, kept = t.shape, resident(t)
    gradients = t.trained * t.trained_parameters / t.state_shards
    values = 0.0 if t.value is None else float(t.trained * t.value.parameters)
    critic = {} if t.value is None else {"value model's activations": value_activations(t)}
    buckets = {"gradients": gradients + values} if t.bucketed else {}
    earlier = {"gradients": gradients + values} if t.accumulates else buckets
    whole = replace(t, compiled=t.compiled and "all")
    layer = t.batch.tokens * layer_bytes(whole) + cast_bytes(t, s.layer_matrices)
    saved = {"activations": saved_bytes(t)} | critic | earlier
    # Where layers are computed again, their casts live only as long as autocast's cache, in the forward pass; compiled layers
    # cast within, past that cache.
    # A float32 head is copied whole, but by TRL, which copies a tile at a time.
    copies_head = (t.mixed or t.quantised is not None) and t.head in ("loss", "log_probs", "full")
    head_cast = t.compute * s.embedding if copies_head else 0
    casts = head_cast + cast_bytes(t, s.layers * s.layer_matrices)
    early, late = (
        head_cast if t.recomputes and (t.compiled or at_backward) else casts for at_backward in (False, True)
    )
    head_gradient = t.trained * s.embedding if t.full and t.head != "none" else 0
    found = {
        "end of the forward pass": kept | saved | {"bf16 copies of weights": early, "logits": head_forward(t)},
        "start of the backward pass": kept | saved | {"bf16 copies of weights": late,
                                                      "logits and head's gradient": head_backward(t)},
        "end of the backward pass": kept | {"gradients": gradients + values, "activations of a layer": layer,
                                            "gradient of the embedding": head_gradient if s.tied else 0},
        "optimiser step": kept | {"gradients": gradients + values,
                                  "temporaries": OPTIMIZERS[t.optimizer][1] * (gradients + values)},
    }  # fmt: skip
    if t.recomputes or t.compiled:
        again = layer - (0 if t.checkpointing else min(layer, t.batch.tokens * layer_bytes(t)))
        found["backward pass of the last layer"] = kept | saved | {
            "bf16 copies of weights": head_cast, "recomputed of a layer": again, "gradients within a layer": backward_bytes(t),
            "gradient of the head": head_gradient,
        }  # fmt: skip
    if t.rollout is not None:
        found["rollout"] = kept | buckets | {"reading prompts": prefill_bytes(t)}
    return {moment: {name: size for name, size in lines.items() if size} for moment, lines in found.items()}


# What is always there -----------------------------------------------------------------------------------------------


def resident(t: Training) -> dict[str, float]:
    """Lines of every moment: weights, optimiser states, other models, and the rollout engine's buffers."""
    lines = {"weights": weight_bytes(t) / t.weight_shards, "optimiser states": optimizer_bytes(t) / t.state_shards}
    if t.value is not None:
        lines["value model's weights and states"] = t.trained * t.value.parameters * (1 + OPTIMIZERS[t.optimizer][0])
    return lines | t.frozen | rollout_bytes(t)


def weight_bytes(t: Training) -> float:
    """Full: t N. LoRA: c N for the base and 4 Nt for the adapter; quantised matrices by `MATRIX_BYTES`, all else float32."""
    s = t.shape
    if t.lora is None:
        return float(t.trained * s.parameters)
    adapter = 4 * t.trained_parameters
    if t.quantised is None:
        return float(t.compute * s.parameters + adapter)
    matrices = s.layers * s.layer_matrices
    return MATRIX_BYTES[t.quantised] * matrices + 4 * (s.parameters - matrices) + adapter


def optimizer_bytes(t: Training) -> float:
    """State of `OPTIMIZERS` times t Nt; bitsandbytes' 8-bit states of embeddings stay float32."""
    state = OPTIMIZERS[t.optimizer][0]
    found = t.trained * state * t.trained_parameters
    if t.optimizer in EIGHT_BIT and t.full:
        found += t.shape.embedding * (4 * EIGHT_BIT[t.optimizer] - t.trained * state)
    return found


def rollout_bytes(t: Training) -> dict[str, float]:
    """2 n K c for each token of each row; 2 x 4 V for each row (logits, tempered logits); and the rounded weights."""
    if t.rollout is None:
        return {}
    s, rows = t.shape, t.rollout.rows
    cache = 2 * s.layers * s.keys * t.compute * rows * t.rollout.length
    return {"rollout cache": float(cache), "rollout logits": 8.0 * s.vocab * rows, "rounded weights for rollouts": rounded_bytes(t)}  # fmt: skip


def rounded_bytes(t: Training) -> float:
    """c for every float32 parameter of a policy that computes in another format: all when all are trained, else the adapter
    and, beside quantised matrices, the rest of the base (`rollouts.rounded`)."""
    if t.rollout is None or t.compute == 4 or (t.full and not t.mixed):
        return 0.0
    s = t.shape
    base = s.parameters - s.layers * s.layer_matrices if t.quantised is not None else 0
    return float(t.compute * (t.trained_parameters + base))


# Activations --------------------------------------------------------------------------------------------------------


def saved_bytes(t: Training) -> float:
    """Without checkpointing n layers of `layer_bytes`; with it, each layer's input: r H for each token, and one layer."""
    s, tokens = t.shape, t.batch.tokens
    return float(tokens * s.layers * (t.residual * s.hidden if t.checkpointing else layer_bytes(t)))


def layer_bytes(t: Training) -> float:
    """Bytes that autograd saves for one token in one layer."""
    if t.compiled is not None:
        return kept_by_compiler(t) if t.compiled == "all" else kept_of_products(t)
    return norm_bytes(t) + input_bytes(t) + attention_bytes(t) + mlp_bytes(t)


def kept_of_products(t: Training) -> float:
    """Selective checkpointing: the layer's input (r H); of each product whose result the backward pass reads c times its
    width, unless it is a wide one that is not kept; attention's result and log-sums, c Q + 4 for each head.

    A LoRA pair is two products more, of which the second is never kept (nor any that reads at most half a layer's width). The last
    product of a layer is only read where it is normed.
    """
    assert t.compiled in EVERY
    s, c, every = t.shape, t.compute, EVERY[t.compiled]
    adapted = set() if t.lora is None else s.target_names(t.lora)
    products: list[tuple[int, int, bool]] = []
    for place, (name, inputs, outputs, _) in enumerate(s.linears):
        read = place < len(s.linears) - 1 or s.family.normed_result
        products.append((inputs, outputs, read))
        if t.lora is not None and name in adapted:
            products += [(inputs, t.lora.rank, True), (t.lora.rank, outputs, read)]
    width = wide = 0
    for inputs, outputs, read in products:
        if 2 * inputs <= s.hidden:
            continue
        is_wide = outputs > 2 * inputs
        wide += is_wide
        if read and (not is_wide or (every and wide % every == 0)):
            width += outputs
    return (
        t.residual * s.hidden + c * (width + s.queries) + 4 * s.heads + (c * t.batch.longest if t.batch.masked else 0)
    )


def kept_by_compiler(t: Training) -> float:
    """The layer's input (r H); the inputs of trained matrices, which are not computed again; what attention reads and gives
    (`attention_bytes`); o's result (c H), those of gate and up (c I each); a number of 4 for each norm.

    Which results torch's partitioner keeps follows from its heuristics, and was read off a compiled Qwen2 layer of torch 2.13;
    a test holds it. For other families the same parts are taken.
    """
    s, c, family = t.shape, t.compute, t.shape.family
    results = (family.norms - 1) * s.hidden + (2 if family.gated else 1) * s.inner
    heads = s.queries + s.keys if family.head_norm else 0
    return t.residual * s.hidden + attention_bytes(t) + c * (results + heads + _inputs_kept(t)) + 4 * family.norms


def backward_bytes(t: Training) -> float:
    """What the backward pass of a compiled layer holds at its largest beside what was kept or computed again: where the activation
    of the feed-forward part is differentiated, the gradients of what enters it (2 c I) and of the product (c I). A LoRA pair adds its
    own result and gradient to the one that it enters, and its own gradient to the last.

    Read off the code that the compiler made of a Qwen2 layer: one kernel reads and writes all of these.
    """
    if t.compiled is None:
        return 0.0
    adapted = set() if t.lora is None else t.shape.target_names(t.lora)
    *entering, (last, inner, _, _) = t.shape.linears[2 if t.shape.family.fused else 4 :]
    width = sum(outputs * (3 if name in adapted else 1) for name, _, outputs, _ in entering)
    return float(t.compute * t.batch.tokens * (width + inner * (2 if last in adapted else 1)))


def _inputs_kept(t: Training) -> int:
    """Widths of the inputs of trained matrices: both normed values and the feed-forward part's product (2 H + I), beside
    attention's result, which is kept anyway. LoRA: of those that a pair reads, attention's result too since it is cast
    to the pair's format; and the rank for each pair."""
    s = t.shape
    if t.lora is None:
        return 2 * s.hidden + s.inner
    return sum(width for width, _ in _inputs_of_pairs(t)) + t.lora.rank * len(s.targets(t.lora))


def _inputs_of_pairs(t: Training) -> list[tuple[int, int]]:
    """(width, number of LoRA pairs that read it) of each input that one reads, attention's result left out: that is kept anyway."""
    assert t.lora is not None
    opening = 1 if t.shape.family.fused else 3
    linears, adapted = t.shape.linears, t.shape.target_names(t.lora)
    groups = (linears[:opening], linears[opening + 1 : -1], linears[-1:])
    readers = [(group[0][1], sum(name in adapted for name, *_ in group)) for group in groups]
    return [(width, pairs) for width, pairs in readers if pairs]


def norm_bytes(t: Training) -> float:
    """RMSNorm saves its input in float32 (4 H) and, when its weight is trained, the normed value (r H, or 4 H where the model
    multiplies in float32); norms of queries and keys the same over Q + K, in the compute format. LayerNorm saves r H."""
    s, family = t.shape, t.shape.family
    if family.norm_bias:
        return family.norms * t.residual * s.hidden
    normed, heads = (4, 4) if family.wide_norms else (t.residual, t.compute)
    trained = 1 if t.full else 0
    of_heads = (s.queries + s.keys) * (4 + trained * heads) if family.head_norm else 0
    return family.norms * s.hidden * (4 + trained * normed) + of_heads


def input_bytes(t: Training) -> float:
    """Inputs of matrices that no other line counts.

    Trained matrices save their input: c H once for attention and once for the feed-forward part, or, under autocast, once
    for every matrix, each of which casts it anew. Frozen ones save none; LoRA pairs save their input, once for those that
    share it, and each its inner value (c rank). Dropout gives each pair an input of its own, and a mask (1 byte an input).
    """
    s, c = t.shape, t.compute
    if t.lora is None:
        readers = sum(1 for _, inputs, _, _ in s.linears[:-1] if inputs == s.hidden) - (s.queries == s.hidden)
        return c * s.hidden * (readers if t.mixed else 2)
    if t.lora.dropout:
        return sum(c * (inputs + t.lora.rank) + inputs for inputs, _ in s.targets(t.lora))
    return c * (sum(width for width, _ in _inputs_of_pairs(t)) + t.lora.rank * len(s.targets(t.lora)))


def attention_bytes(t: Training) -> float:
    """Queries, keys, values and output in c bytes, and a log-sum in 4 for each head. Keys and values are as wide as queries
    where they are repeated. One matrix for all three: values are a view that keeps the whole projection, c (Q + K) more.

    A mask is c L. `eager` saves scores in place of log-sums: (4 + c) L for each head, c more with soft-capping.
    """
    s, c, longest = t.shape, t.compute, t.batch.longest
    keys = s.queries if t.repeats_keys or t.eager or t.batch.masked else s.keys
    found = c * (2 * s.queries + 2 * keys) + (c * (s.queries + s.keys) if s.family.fused else 0)
    if t.eager:
        return found + s.heads * longest * (4 + c * (2 if s.softcap else 1))
    return found + 4 * s.heads + (c * longest if t.batch.masked else 0)


def mlp_bytes(t: Training) -> float:
    """Gated: gate, its activation, up, and (for a trained `down`) their product: 4 c I, frozen 3 c I. Plain: 2 or 1 c I."""
    tensors = (4 if t.shape.family.gated else 2) - (0 if t.full else 1)
    return tensors * t.compute * t.shape.inner


def value_activations(t: Training) -> float:
    """Those of a value model, which is never checkpointed."""
    assert t.value is not None
    return saved_bytes(
        Training(
            t.value, t.batch, "none", compute=t.compute, trained=t.trained, eager=t.eager, repeats_keys=t.repeats_keys
        )
    )


def cast_bytes(t: Training, parameters: int) -> float:
    """Autocast keeps a copy in the compute format of every matrix that it has multiplied by."""
    return float(t.compute * parameters) if t.mixed else 0.0


# Head ---------------------------------------------------------------------------------------------------------------


def chunk_tokens(predicted: int, vocab: int) -> int:
    """Tokens of one chunk of our head: equal chunks of at most `CHUNK` bytes in float32, at least 128 tokens."""
    most = max(128, CHUNK // (4 * vocab))
    return math.ceil(predicted / max(1, math.ceil(predicted / most)))


def head_forward(t: Training) -> float:
    """`loss` makes its gradients here: logits of a chunk in the compute format, 4 V H for the head, c M H for hidden states.
    `log_probs`: float32 logits of a chunk. `full`: logits in the compute format and twice in float32."""
    s, m, c = t.shape, t.batch.predicted, t.compute
    if t.head == "loss":
        return c * chunk_tokens(m, s.vocab) * s.vocab + _head_gradient(t) + c * m * s.hidden
    if t.head == "log_probs":
        return 4 * chunk_tokens(m, s.vocab) * s.vocab
    if t.head == "tiles":
        return c * min(m, TILE[0]) * min(s.vocab, TILE[1])
    return (c + 8) * t.batch.tokens * s.vocab if t.head == "full" else 0


def head_backward(t: Training) -> float:
    """`loss`: the head's gradient in float32 and as it is given on. `log_probs`: a chunk of float32 logits, its gradient in the
    compute format, and 4 V H. `tiles`: a tile, 4 V H, and 4 M H. `full`: three times float32."""
    s, m, c = t.shape, t.batch.predicted, t.compute
    if t.head == "loss":
        return (1.5 if c == 2 else 2) * _head_gradient(t) + 2 * c * m * s.hidden
    if t.head == "log_probs":
        return (4 + (c if c == 2 else 0)) * chunk_tokens(m, s.vocab) * s.vocab + _head_gradient(t) + c * m * s.hidden
    if t.head == "tiles":
        return c * min(m, TILE[0]) * min(s.vocab, TILE[1]) + _head_gradient(t) + 4 * m * s.hidden
    return 12 * t.batch.tokens * s.vocab if t.head == "full" else 0


def _head_gradient(t: Training) -> float:
    return 4.0 * t.shape.embedding if t.full else 0.0


# Rollouts -----------------------------------------------------------------------------------------------------------


def prefill_bytes(t: Training) -> float:
    """Four tensors of width I (gate and up are one product, both halves of which live until they have been multiplied), and the
    residual in float32 and in c, for the prompt tokens of one pass."""
    assert t.rollout is not None
    s, tokens = t.shape, min(PREFILL, t.rollout.prompt_tokens)
    return float(tokens * (4 * s.inner * t.compute + s.hidden * (4 + t.compute)))
