"""The cache of Infini-attention (arXiv 2404.07143): per layer a memory, and the keys and values of the open segment.

Its size does not depend on how many tokens went through it. It can be continued, branched, moved, saved and loaded.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin

from .configuration_infini import LAYER_TYPE, InfiniLlamaConfig
from .memory_infini import MemoryState, commit, float_rows, scan, sigma, write
from .timeline_infini import Layout, Timeline, gather_tokens

__all__ = ["InfiniCache", "InfiniCacheLayer", "projection_fingerprint"]


# The tensors of a layer, by their names in a saved memory.
STATE = (
    "open.keys",
    "open.values",
    "memory.matrix",
    "memory.normalizer",
    "pending.matrix",
    "pending.normalizer",
)
# So many decoded tokens wait at most, to be written at once: enough that the write costs each little, and few to keep.
MAX_WAITING = 64


class InfiniCacheLayer(CacheLayerMixin):
    """What one layer keeps between forward calls. Legend of the shapes: see `memory_infini`.

    Attributes:
        memory: of all completed segments; (B, K, D, D) and the normalizer, float32. None before the first token.
        pending: what the tokens of the open segment add up to, to be committed to the memory once the segment is full, in
            the same shapes. It spares a copy of the keys without rotary positions. Decoded tokens are added when it is asked for.
        keys, values: (B, K, capacity, D) in the model's dtype, the open segment for local attention, keys with rotary
            positions. The first `timeline.filled[row]` slots of a row are in use. None while no segment is open.
        timeline: where the rows stand, the same object in all layers.
        written_with: (segment_length, memory_update) of the model that wrote it.
        fingerprint: of the key and value projections that wrote it, see `projection_fingerprint`.
    """

    _layer_type = LAYER_TYPE  # lets `DynamicCache(config=config)` build these layers
    is_sliding = False
    supports_early_init = False

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.device: torch.device | None = None
        self._clear()

    def _clear(self) -> None:
        self._waiting: list[tuple[torch.Tensor | None, ...]] = []
        self.keys = self.values = self.memory = self.pending = None
        self.timeline: Timeline | None = None
        self.written_with: tuple[int, str] | None = None
        self.fingerprint: torch.Tensor | None = None
        self.is_initialized = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.device = key_states.device
        self.timeline = Timeline.start(key_states.shape[0])
        self.is_initialized = True

    @property
    def pending(self) -> MemoryState | None:
        """What the open segment adds to the memory, see above; the tokens that wait are written first."""
        if self._waiting:
            keys, values, strength = (None if x[0] is None else torch.cat(x, dim=2) for x in zip(*self._waiting))
            self._waiting, rule = [], self.written_with[1]
            with torch.no_grad():
                self._pending = self._pending.add(write(rule, sigma(keys), values, self.memory, strength))
        return self._pending

    @pending.setter
    def pending(self, state: MemoryState | None) -> None:
        self._waiting, self._pending = [], state

    # What a forward call does, in this order: local keys and values, then the memory.

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layout: Layout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in new keys and values, and return those that local attention looks at.

        Args:
            key_states: (B, K, T, D), with rotary positions.
            value_states: (B, K, T, D).
            layout: where the tokens go.

        Returns:
            Keys and values (B, K, W, D) for a layout within segments, (B * S, K, W, D) for one across.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled():
            # What was written in inference mode cannot be changed, or used for gradients, outside of it.
            held = (self.keys, self.values, *(self.memory or ()), *(self._pending or ()))
            if any(x is not None and x.is_inference() for x in held):
                self._map_tensors(lambda x: x.clone() if x.is_inference() else x)
        self.timeline = layout.after
        self.written_with = (layout.segment_length, layout.memory_update)
        if layout.num_segments > 0:
            keys, self.keys = self._split(self.keys, key_states, layout)
            values, self.values = self._split(self.values, value_states, layout)
            return keys, values
        self.keys = self._append(self.keys, key_states, layout)
        self.values = self._append(self.values, value_states, layout)
        if layout.query_offset == 0 and layout.query_slots is None:
            return key_states, value_states  # nothing was there before
        return self.keys[:, :, : layout.key_width], self.values[:, :, : layout.key_width]

    @staticmethod
    def _append(buffer: torch.Tensor | None, states: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Write (B, K, T, D) into the slots of the open segment; returns the buffer (B, K, capacity, D)."""
        capacity = 0 if buffer is None else buffer.shape[2]
        if capacity < layout.key_width:
            capacity = min(layout.segment_length, max(layout.key_width, 2 * capacity, 64))
            capacity = max(capacity, layout.key_width)
            grown = states.new_zeros(*states.shape[:2], capacity, states.shape[3])
            if buffer is not None:
                grown[:, :, : buffer.shape[2]] = buffer
            buffer = grown
        elif torch.is_grad_enabled() and (buffer.requires_grad or states.requires_grad):
            buffer = buffer.clone()  # the graph of the last call may need the old one
        if layout.row_index is None:
            buffer[:, :, layout.query_offset : layout.query_offset + states.shape[2]] = states
        else:
            buffer[layout.row_index, :, layout.slot_index] = states[layout.row_index, :, layout.column_index]
        return buffer

    @staticmethod
    def _split(
        buffer: torch.Tensor | None, states: torch.Tensor, layout: Layout
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Lay (B, K, T, D) out as segments (B * S, K, W, D), and keep those of the segment that stays open."""
        batch_size, states = states.shape[0], states.transpose(1, 2)
        if layout.key_index is None:
            return layout.to_segments(states).transpose(1, 2), None
        if any(layout.before.filled):
            states = torch.cat([buffer[:, :, : max(layout.before.filled)].transpose(1, 2), states], dim=1)
        segments = gather_tokens(states, layout.key_index, batch_size * layout.num_segments)
        if not any(layout.after.filled):
            return segments.transpose(1, 2), None
        return segments.transpose(1, 2), gather_tokens(states, layout.open_index, batch_size).transpose(1, 2)

    def update_memory(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layout: Layout,
        strength: torch.Tensor | None = None,
    ) -> MemoryState:
        """Write new tokens, and return what they may read: the memory at the start of each one's segment.

        Args:
            key_states: (B, K, T, D), without rotary positions.
            value_states: (B, K, T, D).
            layout: where the tokens go.
            strength: (B, K, T, 1) float32, how much each token counts, from 0 to 1. None: 1.

        Returns:
            A state of (B, K, ...) for a layout within segments, (B * S, K, ...) for one across.
        """
        keys, values = key_states.transpose(1, 2), value_states.transpose(1, 2)  # (B, T, K, D)
        if self.memory is None:
            self.memory = self.pending = MemoryState.zeros(layout.memory_update, keys, values)
        rule, start = layout.memory_update, self.memory
        if layout.num_segments == 0:
            is_decoded = key_states.shape[2] == 1 and layout.valid is None and not torch.is_grad_enabled()
            if is_decoded and not torch.compiler.is_compiling():  # a list that grows would be compiled for each length
                self._waiting.append((key_states, value_states, strength))
                if layout.completes is not None or len(self._waiting) == MAX_WAITING:
                    self._go_on(self.pending, layout)
                return start
            sigma_k = sigma(keys)
            if layout.valid is not None:
                sigma_k = sigma_k * layout.valid[:, :, None, None]  # sigma(0) is 1: padding must be taken out after it
            self._go_on(self.pending.add(write(rule, sigma_k.transpose(1, 2), value_states, start, strength)), layout)
            return start

        def to_segments(x: torch.Tensor) -> torch.Tensor:
            return layout.to_segments(x).transpose(1, 2).unflatten(0, (x.shape[0], layout.num_segments))

        # (B, S, K, W, D). Slots without a token are to stay 0 and sigma(0) is 1, so where there may be some, it comes first.
        sigma_k = sigma(to_segments(keys)) if layout.token_index is None else to_segments(sigma(keys)).contiguous()
        starts, self.memory, self.pending = scan(
            rule,
            sigma_k,  # contiguous, as the values: the products of `scan` are three times faster then
            float_rows(to_segments(values)),
            start,
            self.pending,
            restarts=layout.restarts,
            completes=layout.completes,
            relay=layout.relay,
            strength=None if strength is None else to_segments(strength.transpose(1, 2)),
        )
        return starts.map(lambda x: x.flatten(0, 1))

    def _go_on(self, pending: MemoryState, layout: Layout) -> None:
        """The open segments have added `pending` so far; take it into the memory of the rows whose segment is full."""
        self.pending = pending
        if layout.completes is not None:
            self.memory = self.memory.add(commit(layout.memory_update, pending), where=layout.completes)
            self.pending = pending.masked(~layout.completes)

    def state(self) -> tuple[torch.Tensor | None, ...]:
        """All tensors, in the order of `STATE`, for code that passes state on as a value, as gradient checkpoints do."""
        empty = (None, None)
        return (self.keys, self.values, *(self.memory or empty), *(self.pending or empty))

    def set_state(self, state: tuple[torch.Tensor | None, ...], timeline: Timeline) -> None:
        """Take on what `state` returned, of rows that stand at `timeline`."""
        self.keys, self.values, matrix, normalizer, pending_matrix, pending_normalizer = state
        self.memory = None if matrix is None else MemoryState(matrix, normalizer)
        self.pending = None if matrix is None else MemoryState(pending_matrix, pending_normalizer)
        self.device = next((x.device for x in state if x is not None), self.device)
        self.timeline, self.is_initialized = timeline, True

    # The rest of the life cycle.

    def get_seq_length(self) -> int:
        """All tokens seen, padding included: `generate` cuts a prompt that it continues by this."""
        return self.timeline.seen if self.timeline is not None else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that local attention sees."""
        filled = max(self.timeline.filled) if self.timeline is not None else 0
        return filled + query_length, self.get_seq_length() - filled

    def get_max_length(self) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        """Rows held, -1 before the first token."""
        return len(self.timeline.positions) if self.timeline is not None else -1

    def _map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name in ("keys", "values"):
            if getattr(self, name) is not None:
                setattr(self, name, function(getattr(self, name)))
        for name in ("pending", "memory"):  # what waits is to be written with the memory as it is
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name).map(function))

    def _select_rows(self, rows: torch.Tensor) -> None:
        if self.timeline is None:
            return
        self._map_tensors(lambda x: x.index_select(0, rows.to(x.device)))
        self.timeline = self.timeline.select(rows.tolist())

    def reset(self) -> None:
        self._clear()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Put `repeats` copies of each row in its place."""
        if self.timeline is not None:
            self._select_rows(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows with these indices, or where this mask is True, in this order."""
        if self.timeline is not None:
            self._select_rows(torch.arange(self.batch_size)[indices.cpu()])

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, unless it is 0: tokens cannot be taken out of a memory again."""
        if tokens_to_remove != 0:
            raise ValueError(
                f"`crop({tokens_to_remove})`: tokens cannot be taken out of a compressive memory again. Keep a copy "
                "from before (`copy.deepcopy(cache)`) and go on from that. Assisted decoding needs a model without "
                "recurrent memory."
            )

    def offload(self) -> None:
        self._map_tensors(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map_tensors(lambda x: x.to(self.device, non_blocking=True))

    def to(self, device: torch.device | str) -> None:
        """Move everything to another device."""
        self._map_tensors(lambda x: x.to(device))
        self.device = torch.device(device)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors that there are, by the names of `STATE`, the open segment without its unused slots."""
        filled = max(self.timeline.filled) if self.timeline is not None else 0
        named = dict(zip(STATE, self.state()))
        for name in STATE[:2]:
            named[name] = named[name][:, :, :filled] if filled > 0 else None
        return {name: x for name, x in named.items() if x is not None}


class InfiniCache(Cache):
    """The memory of an InfiniLlama, as a thing to own.

    It goes where Transformers' caches go: `model.generate(..., past_key_values=cache)`, `model(..., past_key_values=cache)`.
    A copy for each of many questions is `copy.deepcopy(cache)`, many at once `cache.batch_repeat_interleave(n)`.

    Args:
        config: of the model that will write it.

    Example:

    ```python
    >>> cache = InfiniCache(model.config)
    >>> with torch.no_grad():
    ...     model(document_ids, past_key_values=cache, logits_to_keep=1)
    >>> cache.save("document.safetensors")
    >>> cache = InfiniCache.load("document.safetensors", model)
    >>> model.generate(question_ids, past_key_values=cache)
    ```
    """

    FORMAT = "infini_llama.memory.v2"

    def __init__(self, config: InfiniLlamaConfig):
        super().__init__(layers=[InfiniCacheLayer() for _ in range(config.num_hidden_layers)])
        self.num_key_value_heads, self.head_dim = config.num_key_value_heads, config.head_dim

    def __iter__(self) -> Iterator[MemoryState | None]:
        """The memory of each layer."""
        return (layer.memory for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of state in use: memory, pending writes, open segment."""
        return sum(x.numel() * x.element_size() for layer in self.layers for x in layer.tensors().values())

    def to(self, device: torch.device | str) -> "InfiniCache":
        """Move to another device, in place."""
        for layer in self.layers:
            layer.to(device)
        return self

    def detach_(self) -> "InfiniCache":
        """Cut the graph, in place: what is read from now on sends no gradient to what was written before.

        For training over a text in several calls (truncated backpropagation through time).
        """
        for layer in self.layers:
            layer._map_tensors(torch.Tensor.detach)
        return self

    def save(self, path: str | os.PathLike) -> None:
        """Write everything into one safetensors file: the memory and at most one open segment per layer.

        The file appears whole or not at all.

        Raises:
            ValueError: there is nothing to save yet.
            OSError: the file cannot be written.
        """
        if self.get_seq_length() == 0:
            raise ValueError("`save`: this cache is empty. Run the model with `past_key_values=cache` first.")
        path = os.path.abspath(path)
        if not os.path.isdir(os.path.dirname(path)):
            raise FileNotFoundError(f"There is no folder '{os.path.dirname(path)}' to save into. Create it first.")
        first = self.layers[0]
        names = first.tensors()
        tensors = {
            name: torch.stack([layer.tensors()[name].detach().cpu() for layer in self.layers]) for name in names
        }
        segment_length, memory_update = first.written_with
        description = {
            "num_layers": len(self.layers),
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "segment_length": segment_length,
            "memory_update": memory_update,
            "fingerprint": [layer.fingerprint.tolist() for layer in self.layers],
        }
        # As tensors, because numbers in the header would let the size of the file depend on them.
        timeline = first.timeline
        tensors["timeline.seen"], tensors["timeline.rows"] = torch.tensor([timeline.seen]), torch.tensor(timeline[1:])
        metadata = {"format": self.FORMAT, "description": json.dumps(description)}
        metadata["checksum"] = _checksum(metadata["description"], tensors)
        temporary = f"{path}.{os.getpid()}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(save(tensors, metadata))
            os.replace(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)

    @classmethod
    def load(cls, path: str | os.PathLike, model: nn.Module) -> "InfiniCache":
        """Read what `save` wrote, onto the devices of `model`.

        Args:
            path: the file.
            model: the `InfiniLlamaForCausalLM` or `InfiniLlamaModel` (or a PEFT model around it) that will go on with it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, altered or something else; or it was written by a model with other
                shapes, another segment length, another write rule or other key and value projections.
        """
        path = os.fspath(path)
        if not os.path.exists(path):
            raise FileNotFoundError(f"There is no memory file at '{path}'.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"'{path}' is truncated or not a safetensors file ({error}). Save the memory again."
            ) from error
        if metadata.get("format") != cls.FORMAT:
            raise ValueError(
                f"'{path}' is not a memory of this library: its format is {metadata.get('format')!r}, not {cls.FORMAT!r}."
            )
        if metadata.get("checksum") != _checksum(metadata.get("description", ""), tensors):
            raise ValueError(f"'{path}' was altered after it was saved: its checksum does not match. Save it again.")
        description = json.loads(metadata["description"])
        _refuse_other_model(path, description, model)

        cache = cls(model.config)
        positions, filled, has_memory = tensors["timeline.rows"].tolist()
        timeline = Timeline(
            int(tensors["timeline.seen"]), tuple(positions), tuple(filled), tuple(map(bool, has_memory))
        )
        for index, (layer, (k_proj, _)) in enumerate(zip(cache.layers, _projections(model))):
            layer.written_with = (description["segment_length"], description["memory_update"])
            layer.fingerprint = torch.tensor(description["fingerprint"][index])
            state = [tensors[name][index] if name in tensors else None for name in STATE]
            keys_and_values = [x if x is None else x.to(model.dtype) for x in state[:2]]
            layer.set_state((*keys_and_values, *state[2:]), timeline)
            layer.to(_execution_device(k_proj))
        return cache


def projection_fingerprint(*modules: nn.Module) -> torch.Tensor:
    """A number for each module that changes with its weights, (len(modules),) int64, on the device of the weights.

    It samples the bits of every parameter and buffer, rounded to bfloat16, so that a checkpoint loaded in float32 and in
    bfloat16 keeps its number. (By way of float16 it is rounded twice, and may not.) The arithmetic is exact, so all
    devices agree.
    """
    numbers = []
    for module in modules:
        total = torch.zeros((), dtype=torch.int64, device=_execution_device(module))
        with _weights_at_hand(module):
            for tensor in [*module.parameters(), *module.buffers()]:
                if hasattr(tensor, "to_local"):  # FSDP: what is here; to ask the other processes is a matter of all
                    tensor = tensor.to_local()
                flat = tensor.detach().reshape(-1)
                sample = flat[:: max(1, flat.numel() // 4096)].to(torch.bfloat16).view(torch.int16).long()
                factors = torch.arange(1, 2 * len(sample), 2, device=sample.device)
                number = (sample * factors).sum() + flat.numel()
                total = 1_000_003 * total + number.to(total.device)
        numbers.append(total)
    return torch.stack(numbers)


def _is_offloaded(module: nn.Module) -> bool:
    return any(parameter.device.type == "meta" for parameter in module.parameters())


def _execution_device(module: nn.Module) -> torch.device:
    """Where the module computes, which is not where its weights are if Accelerate offloads them."""
    if _is_offloaded(module) and hasattr(module, "_hf_hook"):
        return torch.device(module._hf_hook.execution_device)
    return next(module.parameters()).device


@contextmanager
def _weights_at_hand(module: nn.Module) -> Iterator[None]:
    """Inside it, weights that Accelerate has offloaded are loaded."""
    hooks = [(part, part._hf_hook) for part in module.modules() if _is_offloaded(part) and hasattr(part, "_hf_hook")]
    for part, hook in hooks:
        hook.pre_forward(part)
    try:
        yield
    finally:
        for part, hook in hooks:
            hook.post_forward(part, None)


def _projections(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """The key and value projections of a model, layer by layer, also below a PEFT model."""
    return [(m.k_proj, m.v_proj) for m in model.modules() if hasattr(m, "memory_gate")]


def _checksum(description: str, tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(description.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _refuse_other_model(path: str, description: dict, model: nn.Module) -> None:
    config = model.config
    expected = {
        "num_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "segment_length": config.segment_length,
        "memory_update": config.memory_update,
    }
    differences = [
        f"{name} {description[name]!r} in the file, {value!r} in the model"
        for name, value in expected.items()
        if description[name] != value
    ]
    if not differences:
        fingerprints = [projection_fingerprint(*pair).tolist() for pair in _projections(model)]
        other = sum(a != b for a, b in zip(fingerprints, description["fingerprint"], strict=True))
        if other:
            differences = [f"key and value projections, in {other} of {len(fingerprints)} layers"]
    if differences:
        raise ValueError(
            f"'{path}' was written by a model that differs in: {'; '.join(differences)}. Load it into the model that "
            "wrote it, or let this model read the text again."
        )
