"""Rollouts on torch alone: packed prefill, a static cache, decode steps in CUDA graphs, finished rows compacted away.

The engine runs the trainer's own modules (weights shared, LoRA adapters live) with its own attention over a cache that is
allocated once (`kernels.kv_attention`). On CUDA every decode step, sampling included, is one graph replay; on the CPU the
same code runs without graphs. Each unique prompt is prefilled once, whatever `num_generations` is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from aligntune.models.forward import TOLERANCE, causal_model, decoder, input_device, model_head, packed_log_probs
from aligntune.models.kernels.attention import unsupported_attention
from aligntune.models.kernels.compile import decoding_layers
from aligntune.models.kernels.documents import Documents
from aligntune.models.kernels.joined import joined, lay_together
from aligntune.models.kernels.kv_attention import ROLLOUT, KVStore, Prefill, register_rollout_attention
from aligntune.models.modes import evaluating
from aligntune.models.packed import PackedRows
from aligntune.models.positions import check_positions
from aligntune.rollouts.base import Rollouts, SamplingParams, check_prompts, refuse_extra
from aligntune.rollouts.decode_state import DecodeState
from aligntune.rollouts.step_graphs import StepGraphs, bucket_sizes
from aligntune.rollouts.transformers import seeded

CHECK_EVERY = 16
"""Decode steps between looks at which rows have finished, on CUDA, where looking waits for the device."""
MOST_ROWS = 512
PREFILL_TOKENS = 16_384
"""Prompt tokens of one prefill pass."""


class GraphEngine:
    """See the module. `max_rows` bounds the rows decoded at a time; None: 512, or on CUDA as many as half of the free
    memory holds. `compile_layers` fuses the decode step of a layer with torch.compile (CUDA only; about half a minute once,
    then half as much time a step)."""

    name = "graph"

    def __init__(self, model: nn.Module, *, max_rows: int | None = None, compile_layers: bool = True) -> None:
        register_rollout_attention()
        self.model, self.max_rows = model, max_rows
        self.causal = causal_model(model)
        self.compile_layers = compile_layers
        self.store: KVStore | None = None
        self.sessions: list[_Session] = []

    def generate(self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams) -> Rollouts:
        """See `RolloutEngine`."""
        check_prompts(prompt_ids)
        refuse_extra(self.name, params)
        longest = max(map(len, prompt_ids), default=0) + params.max_new_tokens
        check_positions(self.causal, longest)
        size = max(1, (self.max_rows or self._rows_that_fit(longest)) // params.num_generations)
        result = Rollouts([], [], [], [])
        seed = int(torch.randint(2**31, ())) if params.seed is None else params.seed
        if self._device.type == "cuda":
            lay_together(self.causal)
        with _rollout_mode(self.model, self.causal), seeded(seed, self._device), torch.no_grad():
            for start in range(0, len(prompt_ids), size):
                part = self._generate([list(p) for p in prompt_ids[start : start + size]], params, seed + start)
                result.completion_ids += part.completion_ids
                result.log_probs = (result.log_probs or []) + (part.log_probs or [])
                result.sampler_log_probs += part.sampler_log_probs
                result.finished += part.finished
        return result

    def update_weights(self) -> None:
        """Nothing to do: the weights are the trainer's, and graphs are captured anew if their storage moved. (On CUDA the first
        rollout moves some of them: `lay_together`.)"""

    def release(self) -> None:
        """See `RolloutEngine`: the cache, and the graphs that were captured over it."""
        self.store, self.sessions = None, []

    def _rows_that_fit(self, length: int) -> int:
        """Rows of cache and logits that half of the free memory holds, at most `MOST_ROWS`."""
        if self._device.type != "cuda":
            return MOST_ROWS
        config, weight = self.causal.config.get_text_config(), model_head(self.model).weight
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        cache = 2 * config.num_hidden_layers * config.num_key_value_heads * size * weight.element_size() * length
        logits = 3 * 4 * weight.shape[0]  # float32: as computed, tempered, reshaped
        pooled = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        free = torch.cuda.mem_get_info(self._device)[0] + pooled + (self.store.bytes if self.store else 0)
        return max(1, min(MOST_ROWS, int(free / 2 / (cache + logits))))

    @property
    def _device(self) -> torch.device:
        return input_device(self.model)

    def _generate(self, prompts: list[list[int]], params: SamplingParams, seed: int) -> Rollouts:
        group, count = params.num_generations, len(prompts) * params.num_generations
        store, session = self._buffers(count, max(map(len, prompts)) + params.max_new_tokens, params)
        session.state.begin([prompt for prompt in prompts for _ in range(group)], seed)
        session.state.choose(self._prefill(prompts, group, store).repeat_interleave(group, 0))
        store.attach()
        try:
            steps = self._decode(count, session, store)
        finally:
            store.detach()
        return session.state.results(count, steps)

    def _buffers(self, rows: int, length: int, params: SamplingParams) -> tuple[KVStore, _Session]:
        """The cache, and the state and graphs for these sampling settings, kept from earlier rollouts where they fit."""
        cuda = self._device.type == "cuda"
        if cuda:
            rows, length = bucket_sizes(rows)[0], -(-length // 64) * 64
        if self.store is None or self.store.rows < rows or self.store.length < length:
            self.store, self.sessions = KVStore(rows, length), []
        same = replace(params, seed=None, num_generations=1)
        session = next((s for s in self.sessions if s.state.params == same), None)
        if session is None:
            vocab = model_head(self.model).weight.shape[0]
            session = _Session(DecodeState.empty(self.store.rows, same, vocab, self._device))
            self.sessions.append(session)
        if cuda and (session.graphs is None or session.graphs.stale()):
            state = session.state
            session.graphs = StepGraphs(
                self.causal, state, lambda active: self._step(state, active), self.compile_layers
            )
        return self.store, session

    def _prefill(self, prompts: list[list[int]], group: int, store: KVStore) -> Tensor:
        """Keys and values of the prompts into all rows of their completions; `[P, V]` logits after each prompt."""
        hidden, first = [], 0
        for part in _by_tokens(prompts, PREFILL_TOKENS):
            lengths = torch.tensor([len(prompt) for prompt in part])
            row = torch.repeat_interleave(lengths)
            ends = lengths.cumsum(0)
            places = torch.arange(len(row)) - (ends - lengths)[row]
            rows = [(row + first) * group + g for g in range(group)]
            tensors = [
                torch.tensor([t for prompt in part for t in prompt]), places, torch.cat([ends.new_zeros(1), ends]).int(),
                torch.arange(len(row)).repeat(group), torch.cat(rows), places.repeat(group), ends - 1,
            ]  # fmt: skip
            ids, positions, cu_seqlens, source, target, target_places, last = (x.to(self._device) for x in tensors)
            plan = Prefill(store, Documents(cu_seqlens, int(lengths.max())), source, target, target_places)
            hidden.append(self._trunk(ids[None], positions[None], kv_prefill=plan)[0, last])
            first += len(part)
        return model_head(self.model).logits(torch.cat(hidden))

    def _trunk(self, ids: Tensor, positions: Tensor, **plan: Any) -> Tensor:
        no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)  # passes through transformers as it is
        return decoder(self.causal)(
            input_ids=ids, position_ids=positions, attention_mask=no_mask, use_cache=False, **plan
        ).last_hidden_state

    def _step(self, state: DecodeState, active: int, mask: Tensor | None = None) -> None:
        """One token for the first `active` rows."""
        positions = state.positions[:active]
        hidden = self._trunk(state.tokens[:active, None], positions[:, None], kv_positions=positions, kv_mask=mask)
        state.choose(model_head(self.model).logits(hidden[:, -1]))

    def _decode(self, count: int, session: _Session, store: KVStore) -> int:
        """Steps until every row has finished; returns how many tokens were drawn."""
        state, graphs = session.state, session.graphs
        active = bucket_sizes(count)[0] if graphs else count
        state.finished[count:active] = True  # rows that fill the bucket write completions that nobody reads
        for step in range(1, state.params.max_new_tokens):
            if graphs is None or step % CHECK_EVERY == 1:
                active = _compact(active, state, store, bucket_sizes(active) if graphs else None)
                if active == 0:
                    return step
            if graphs is not None:
                graphs.run(active)
            else:
                longest = int(state.positions[:active].max()) + 1
                seen = torch.arange(longest, device=self._device) <= state.positions[:active, None]
                self._step(state, active, seen[:, None, None])
        return state.params.max_new_tokens


@dataclass
class _Session:
    """What belongs to one set of sampling settings."""

    state: DecodeState
    graphs: StepGraphs | None = None


def _compact(active: int, state: DecodeState, store: KVStore, sizes: list[int] | None) -> int:
    """How many rows go on: 0 when all have finished, fewer when enough have to be worth moving the others to the front.
    `sizes`: the row counts there may be; None: any."""
    live = (~state.finished[:active]).nonzero().flatten()
    count = len(live)
    if count == 0:
        return 0
    if sizes is None:
        wanted = count if count <= 0.75 * active else active
    else:
        wanted = min(size for size in sizes if size >= count)
    if wanted < active:
        fill = state.finished[:active].nonzero().flatten()[: wanted - count]
        rows = torch.cat([live, fill])
        state.keep(rows)
        store.keep(rows)
    return wanted


def check_rollouts(model: nn.Module) -> str | None:
    """Why the graph engine cannot run this model, or None: it is tried on two short prompts, and its log-probabilities
    compared with those of a forward pass."""
    vocab = causal_model(model).get_input_embeddings().weight.shape[0]
    prompts = [[i % vocab for i in range(3, 10)], [i % vocab for i in range(5, 8)]]
    engine = GraphEngine(model, compile_layers=False)
    name = type(engine.causal).__name__
    if lacks := unsupported_attention(engine.causal.config):
        return f"{name} has {lacks}"
    try:
        rollouts = engine.generate(prompts, SamplingParams(max_new_tokens=4, seed=0))
    except Exception as error:  # noqa: BLE001  (a patched model may fail in any way; generate is there for it)
        return f"{name} does not run with a cache of ours: {error}"
    rows = PackedRows.from_completions(prompts, rollouts.completion_ids, input_device(model))
    with torch.no_grad(), evaluating(model), decoding_layers(engine.causal, compiled=False):
        want = packed_log_probs(model, rows).log_probs
    worst = (torch.tensor(rollouts.log_probs, device=want.device).flatten() - want).abs().max().item()
    if worst <= TOLERANCE:
        return None
    return f"{name} gives other log-probabilities with a cache of ours (by {worst:.3g} nats)"


def _by_tokens(prompts: list[list[int]], budget: int) -> Iterator[list[list[int]]]:
    """Consecutive prompts, as many as fit the budget, at least one."""
    part: list[list[int]] = []
    used = 0
    for prompt in prompts:
        if part and used + len(prompt) > budget:
            yield part
            part, used = [], 0
        part.append(prompt)
        used += len(prompt)
    if part:
        yield part


@contextmanager
def _rollout_mode(model: nn.Module, causal: Any) -> Iterator[None]:
    """Evaluation mode, our attention, and one product for all layers that read one input, for the moment."""
    implementation = causal.config._attn_implementation
    causal.set_attn_implementation(ROLLOUT)
    try:
        with evaluating(model), decoding_layers(causal, compiled=False), joined(causal):
            yield
    finally:
        causal.set_attn_implementation(implementation)
