"""InfiniLlama: Transformers' Llama with Infini-attention (arXiv 2404.07143) in every layer.

Only what differs from Llama is here: the attention, which adds a memory to local attention, and the loop over blocks of
segments, which bounds the memory that a long input needs.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_infini import InfiniCache, InfiniCacheLayer, projection_fingerprint
from .configuration_infini import InfiniLlamaConfig
from .memory_infini import MemoryState, float_rows, mix, open_gate, read, read_token, sigma
from .parallel_infini import find_places, refuse_padding
from .timeline_infini import Layout, Timeline, block_widths, plan

__all__ = [
    "InfiniLlamaForCausalLM",
    "InfiniLlamaForSequenceClassification",
    "InfiniLlamaModel",
    "InfiniLlamaPreTrainedModel",
]

logger = logging.get_logger(__name__)

# What this version of Transformers calls `past_key_values`, in its layers, outputs and `generate`: 5.24 renamed it. From
# callers we take both names.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"

# What other code passes along to describe packed documents to a flash attention kernel. We read `position_ids` instead,
# and the kernel sees segments, which these do not describe.
PACKING_KWARGS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


class InfiniMemoryGate(nn.Module):
    """beta of equation 10, one per query head; with `read_gate`, which is not in the paper, b + w x / sqrt(hidden_size) for
    each token. A module, so that PEFT's `modules_to_save` reaches it.
    """

    def __init__(self, config: InfiniLlamaConfig):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(config.num_attention_heads))
        shape = (config.num_attention_heads, config.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape)) if config.read_gate else None
        # A step of the gates' learning rate in all of w then moves a gate as far as a few in b would.
        self.scaling = config.hidden_size**-0.5

    def forward(self, hidden_states: torch.Tensor | None = None) -> torch.Tensor:
        """Of tokens (batch, tokens, hidden_size) to (batch, tokens, heads); (heads,) without `read_gate`, or of no tokens.
        Called as a module, so that hooks which load offloaded weights run.
        """
        if self.weight is None or hidden_states is None:
            return self.bias
        return nn.functional.linear(hidden_states.to(self.weight.dtype), self.weight * self.scaling, self.bias)


class InfiniWriteGate(nn.Module):
    """How strongly each key/value head writes a token: sigmoid(w x + b), not in the paper."""

    def __init__(self, config: InfiniLlamaConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_key_value_heads, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.num_key_value_heads))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, hidden_size) to (batch, heads, tokens, 1), float32 (float64 stays)."""
        logits = float_rows(nn.functional.linear(hidden_states, self.weight, self.bias))
        logits = logits.clamp(min=-40)  # so that, as sigma, it is never 0: what has been written can be divided by
        return torch.sigmoid(logits).transpose(1, 2).unsqueeze(-1)


class InfiniLlamaAttention(LlamaAttention):
    """Local attention inside segments, and a memory of all segments before, behind one gate per head."""

    def __init__(self, config: InfiniLlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.memory_gate = InfiniMemoryGate(config)
        self.write_gate = InfiniWriteGate(config) if config.write_gate else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        layout: Layout,
        past_key_values: InfiniCacheLayer | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states: (batch, tokens, hidden_size).
            position_embeddings: cosines and sines of the positions inside the segments, (batch or 1, tokens, head_dim).
            attention_mask: of the local attention, as the attention implementation wants it.
            layout: where the tokens go.
            past_key_values: of this layer, read, and updated; not the whole cache, so that one compiled layer serves all.
                None: there is nothing before, and nothing is kept. Also called `cache`.

        Returns:
            The output (batch, tokens, hidden_size), and the weights of the local attention (batch, heads, tokens, slots)
            if the attention implementation returns them.
        """
        batch_size, num_tokens, _ = hidden_states.shape
        hidden_shape = (batch_size, num_tokens, -1, self.head_dim)
        past_key_values = kwargs.pop("cache", past_key_values)
        cache = InfiniCacheLayer() if past_key_values is None else past_key_values

        query_states = self.q_proj(hidden_states).view(hidden_shape)
        key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)

        cos, sin = position_embeddings
        rotary_queries, rotary_keys = apply_rotary_pos_emb(query_states.transpose(1, 2), key_states, cos, sin)
        local_keys, local_values = cache.update(rotary_keys, value_states, layout)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(  # eq 6, (rows, slots, heads, head_dim)
            self,
            layout.to_segments(rotary_queries.transpose(1, 2)).transpose(1, 2),
            local_keys,
            local_values,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )

        has_memory = layout.memory_update != "none"
        if has_memory and (layout.reads or past_key_values is not None):
            strength = None if self.write_gate is None else self.write_gate(hidden_states)
            device_type = hidden_states.device.type
            autocasts = torch.is_autocast_enabled(device_type)
            with torch.autocast(device_type, enabled=False) if autocasts else nullcontext():
                memory = cache.update_memory(key_states, value_states, layout, strength)
                if layout.reads:
                    beta = self.memory_gate(hidden_states)
                    beta = layout.to_segments(beta) if beta.dim() > 1 else beta
                    attn_output = self._add_memory(attn_output, layout.to_segments(query_states), beta, memory, layout)
        if self.training and not (has_memory and layout.reads):
            # Data-parallel training waits for a gradient of every parameter, and short texts read nothing.
            for gate in filter(None, (self.memory_gate, self.write_gate)):
                for parameter in gate.parameters():
                    attn_output = attn_output + 0.0 * parameter.sum().to(attn_output.dtype)

        attn_output = layout.to_tokens(attn_output, batch_size)
        attn_output = self.o_proj(attn_output.reshape(batch_size, num_tokens, -1).contiguous())
        if attn_weights is not None:
            attn_weights = layout.to_tokens(attn_weights.transpose(1, 2), batch_size).transpose(1, 2)
        return attn_output, attn_weights

    def _add_memory(
        self,
        attn_output: torch.Tensor,
        query_states: torch.Tensor,
        beta: torch.Tensor,
        memory: MemoryState,
        layout: Layout,
    ) -> torch.Tensor:
        """Equations 7 and 10 on (rows, slots, heads, head_dim); query head h reads the memory of KV head h // G. beta is
        (heads,) or (rows, slots, heads).
        """
        rule, groups = layout.memory_update, (-1, self.num_key_value_groups)
        beta = beta.unflatten(-1, groups)
        if layout.all_read and query_states.shape[1] == 1 and not torch.is_grad_enabled():
            sigma_q = sigma(query_states.view(len(query_states), *beta.shape[-2:], self.head_dim))
            beta = beta.view(-1, *beta.shape[-2:])
            mixed = read_token(rule, sigma_q, attn_output.view(sigma_q.shape), beta, memory)
            return mixed.view(attn_output.shape).to(attn_output.dtype)
        beta = beta.unsqueeze(1) if beta.dim() == 2 else beta.transpose(1, 2)
        gate = open_gate(beta, memory)  # (rows, K, slots or 1, G, 1)
        sigma_q = sigma(query_states.unflatten(2, groups).transpose(1, 2))  # (rows, K, slots, G, head_dim)
        gated_memory = read(rule, sigma_q, memory, gate)
        mixed = mix(gate.transpose(1, 2), attn_output.unflatten(2, groups), gated_memory.transpose(1, 2))
        return mixed.to(attn_output.dtype).flatten(2, 3)


class InfiniLlamaDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: InfiniLlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = InfiniLlamaAttention(config=config, layer_idx=layer_idx)

    # Llama checkpoints layers. We checkpoint blocks, see `InfiniLlamaModel._checkpoint_block`.
    gradient_checkpointing = property(lambda self: False, lambda self, enable: None)


class InfiniLlamaPreTrainedModel(LlamaPreTrainedModel):
    """What all models share: initial gates, and groups of parameters and statistics with the gates apart."""

    config: InfiniLlamaConfig
    config_class = InfiniLlamaConfig
    _no_split_modules = ["InfiniLlamaDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    # Gates take steps that bfloat16 would round away.
    _keep_in_fp32_modules_strict = ["memory_gate"]
    # What went into the memory cannot be taken back, so `generate` must not speculate.
    _is_stateful = True
    _can_compile_fullgraph = False
    _can_record_outputs = {
        "hidden_states": InfiniLlamaDecoderLayer,
        "attentions": InfiniLlamaAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, InfiniMemoryGate):
            for parameter in module.parameters():
                if parameter.element_size() < 4:  # Transformers keeps only what it loads in float32
                    parameter.data = parameter.data.float()
            init.constant_(module.bias, self.config.gate_init)
            if module.weight is not None:
                init.zeros_(module.weight)
        elif isinstance(module, InfiniWriteGate):
            # Nearly open for all tokens: what is not written at first teaches nothing.
            init.zeros_(module.weight)
            init.constant_(module.bias, 2.0)

    def parameter_groups(
        self, learning_rate: float, weight_decay: float = 0.0, gate_learning_rate: float = 0.01
    ) -> list[dict[str, Any]]:
        """Trainable parameters as the groups of a `torch.optim` optimizer, the gates with their own learning rate.

        A gate has to travel about 4 to open or close a head, which steps of a model's learning rate never do. Biases and
        norms have no weight decay, as in `Trainer`; neither have gates.

        Args:
            learning_rate: of everything but the gates.
            weight_decay: of weight matrices.
            gate_learning_rate: of the gates, beta of equation 10 and all of read gates, and of write gates.

        Returns:
            Groups that are not empty, in this order: weight matrices, biases and norms, gates.

        Example:

        ```python
        >>> optimizer = torch.optim.AdamW(model.parameter_groups(learning_rate=1e-4, weight_decay=0.1))
        >>> trainer = Trainer(model, args, train_dataset=dataset, optimizers=(optimizer, None))
        ```
        """
        weights, vectors, gates = [], [], []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                is_gate = "memory_gate" in name or "write_gate" in name
                group = gates if is_gate else weights if parameter.dim() > 1 else vectors
                group.append(parameter)
        groups = [
            {"params": weights, "lr": learning_rate, "weight_decay": weight_decay},
            {"params": vectors, "lr": learning_rate, "weight_decay": 0.0},
            {"params": gates, "lr": gate_learning_rate, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    @torch.no_grad()
    def gate_statistics(self) -> dict[str, float]:
        """How far the gates are open, sigmoid(beta), of a read gate sigmoid(b): mean, minimum and maximum over the heads of
        each layer.

        Returns:
            A flat dict for a tracker: `gates/mean` of the model, and `gates/layer_00/mean`, `.../min`, `.../max`.
        """
        statistics = {"gates/mean": 0.0}
        for index, layer in enumerate(self.base_model.layers):
            beta = layer.self_attn.memory_gate()
            gate = torch.sigmoid(beta.full_tensor() if hasattr(beta, "full_tensor") else beta)
            statistics["gates/mean"] += gate.mean().item() / len(self.base_model.layers)
            for name in ("mean", "min", "max"):
                statistics[f"gates/layer_{index:02d}/{name}"] = getattr(gate, name)().item()
        return statistics


@dataclass
class InfiniModelOutput(BaseModelOutputWithPast):
    """Adds `loss`, the sum of what `block_loss` returned. Without kept hidden states `last_hidden_state` is None."""

    loss: torch.FloatTensor | None = None


class InfiniLlamaModel(InfiniLlamaPreTrainedModel, LlamaModel):
    """Llama's layers with a memory each, without a head.

    Args:
        config: its shape, and how it remembers.
    """

    def __init__(self, config: InfiniLlamaConfig):
        super(LlamaModel, self).__init__(config)  # LlamaModel's own would build its layers first, to be thrown away
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [InfiniLlamaDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    @merge_with_config_defaults
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: InfiniCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        block_loss: Callable[[torch.Tensor, slice], torch.Tensor] | None = None,
        context_group: ProcessGroup | DeviceMesh | None = None,
        cache: InfiniCache | None = None,
        **kwargs,
    ) -> InfiniModelOutput:
        """Llama's forward, over an input of any length, block after block.

        Args:
            input_ids: (batch, tokens).
            attention_mask: (batch, tokens) or (batch, tokens seen before + tokens), 0 for padding, on any side.
            position_ids: (batch, tokens) or (1, tokens). A position that does not come after the one before it starts a
                new document, with an empty memory. By default each row goes on where the cache stands, and padding has
                no position.
            past_key_values: an [`InfiniCache`] to go on with; it is updated in place.
            inputs_embeds: (batch, tokens, hidden_size), in place of `input_ids`.
            use_cache: whether to return a cache; on by default.
            logits_to_keep: if not 0, only the hidden states of this many last tokens are kept and returned, so that the
                memory needed does not depend on the length.
            block_loss: called with the hidden states (batch, columns, hidden_size) of each block and which columns they
                are. Its results are added up, and with `logits_to_keep=0` no hidden states are returned.
            context_group: ranks that hold one sequence together, each a span of whole segments; this call is given the
                span of this rank, as `parallel_infini.shard_sequence` cuts it. A span is one block, whatever its length.
            cache: `past_key_values`, as Transformers calls it from 5.24 on.

        Returns:
            `last_hidden_state` (batch, tokens or `logits_to_keep`, hidden_size), `past_key_values`, `loss` if there is a
            `block_loss`, and if asked for `hidden_states` and `attentions`, the weights of each token over the slots of
            its segment.

        Raises:
            ValueError: an argument has the wrong shape or kind (the message names it).
        """
        past_key_values = cache if past_key_values is None else past_key_values
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        batch_size, num_columns = inputs.shape[:2]
        if num_columns == 0:
            message = f"The input has no tokens: its shape is {tuple(inputs.shape)}. Give at least one per row."
            if past_key_values is not None and past_key_values.get_seq_length() > 0:
                message += (
                    " (`generate` takes a prompt for the beginning of what the cache has seen, unless `attention_mask` "
                    "covers both: with `position_ids` give it too.)"
                )
            raise ValueError(message)
        config = self.config
        timeline = self._check_cache(past_key_values, batch_size)
        valid, positions = self._check_mask_and_positions(attention_mask, position_ids, batch_size, num_columns)
        relay = None
        if context_group is not None:
            if past_key_values is not None:
                raise ValueError(
                    "`past_key_values` was passed together with `context_group`: the memory comes from the ranks before. "
                    "Leave one of them out."
                )
            refuse_padding(valid)
            timeline, relay = find_places(
                context_group, positions, (batch_size, num_columns), config.segment_length, inputs.device
            )
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = InfiniCache(config)
        returned_cache = past_key_values
        if returned_cache is not None and timeline.seen == 0:
            for decoder_layer, cache_layer in zip(self.layers, returned_cache.layers, strict=True):
                attention = decoder_layer.self_attn
                cache_layer.fingerprint = projection_fingerprint(attention.k_proj, attention.v_proj)
        widths = block_widths(timeline, num_columns, config.segment_length, config.block_length)
        if relay is not None:
            # A later rank waits in each layer for all of this span. In blocks, ranks would work one after the other.
            widths = [num_columns]
            block_loss = block_loss and self._loss_in_parts(block_loss)
        if past_key_values is None and len(widths) > 1:
            past_key_values = InfiniCache(config)
        for name in PACKING_KWARGS:
            kwargs.pop(name, None)

        keep = logits_to_keep or (num_columns if block_loss is None else 0)
        kept_states, losses, hidden_states, attentions, stop = [], [], [], [], 0
        for width in widths:
            start, stop = stop, stop + width
            layout = plan(
                timeline,
                width,
                segment_length=config.segment_length,
                memory_update=config.memory_update,
                valid=None if valid is None else valid[:, start:stop],
                positions=None if positions is None else positions[:, start:stop],
                masks_allowed=not is_flash_attention_requested(config),
                relay=relay,
            )
            timeline = layout.after
            # The backward pass begins with the last block: to compute that one twice would spare nothing. Unless a cache
            # was given, with which there may be another call before it.
            is_kept = stop == num_columns and returned_cache is None
            checkpointing = self.gradient_checkpointing and self.training and not is_kept
            forward = self._checkpoint_block if checkpointing else self._block_and_loss
            head = None if block_loss is None else partial(block_loss, columns=slice(start, stop))
            block = forward(inputs[:, start:stop], layout, past_key_values, head, **kwargs)
            kept = min(keep - (num_columns - stop), width)
            if kept > 0:  # even an empty slice would hold on to the hidden states of the whole block
                kept_states.append(block.last_hidden_state[:, width - kept :])
            losses.append(block.loss)
            hidden_states.append(block.hidden_states)
            attentions.append(block.attentions)
        return InfiniModelOutput(
            last_hidden_state=torch.cat(kept_states, dim=1) if len(kept_states) > 1 else next(iter(kept_states), None),
            loss=None if block_loss is None else sum(losses),
            **{CACHE: returned_cache},
            hidden_states=_join_tokens(hidden_states, dim=1),
            attentions=_join_tokens(attentions, dim=2),
        )

    @capture_outputs
    def _forward_block(
        self, inputs: torch.Tensor, layout: Layout, past_key_values: InfiniCache | None, **kwargs
    ) -> BaseModelOutputWithPast:
        """One block of segments through all layers: ids (B, T) or embeddings (B, T, hidden_size)."""
        hidden_states = inputs if inputs.is_floating_point() else self.embed_tokens(inputs)
        layout = layout.to(hidden_states.device)
        mask = local_attention_mask(self.config, layout, hidden_states)
        position_embeddings = self.rotary_emb(hidden_states, position_ids=layout.rotary_positions)
        for index, decoder_layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            if layout.relay is not None and self.gradient_checkpointing and self.training:
                decoder_layer = partial(self._checkpoint_function(), decoder_layer)
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                layout=layout,
                **{CACHE: None if past_key_values is None else past_key_values.layers[index]},
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states))

    def _block_and_loss(
        self,
        inputs: torch.Tensor,
        layout: Layout,
        past_key_values: InfiniCache | None,
        head: Callable[[torch.Tensor], torch.Tensor] | None,
        **kwargs,
    ) -> InfiniModelOutput:
        """`_forward_block`, and its share of the loss: what `head` makes of the hidden states."""
        block = self._forward_block(inputs, layout, past_key_values, **kwargs)
        return InfiniModelOutput(**block, loss=None if head is None else head(block.last_hidden_state))

    def _checkpoint_block(
        self,
        inputs: torch.Tensor,
        layout: Layout,
        past_key_values: InfiniCache | None,
        head: Callable[[torch.Tensor], torch.Tensor] | None,
        **kwargs,
    ) -> InfiniModelOutput:
        """`_block_and_loss`, keeping nothing for the backward pass but its inputs: ids and the state before it.

        So a whole sequence is trained, exactly, with the activations of one block. State goes in and out as values,
        because the backward pass runs the block a second time and must find it as it was.
        """
        layers = [] if past_key_values is None else past_key_values.layers
        states = [layer.state() for layer in layers]
        num_layers, width = len(states), len(states[0]) if states else 0

        # It must not know `layers`: they get what comes out, whose graph knows `run`, and nothing would ever be freed.
        def run(
            inputs: torch.Tensor, *flat_state: torch.Tensor | None
        ) -> tuple[InfiniModelOutput, list[torch.Tensor | None]]:
            cache = InfiniCache(self.config) if num_layers else None
            for index in range(num_layers):
                cache.layers[index].set_state(flat_state[index * width : (index + 1) * width], layout.before)
            block = self._block_and_loss(inputs, layout, cache, head, **kwargs)
            return block, [x for layer in cache.layers for x in layer.state()] if num_layers else []

        flat_states = (x for state in states for x in state)
        block, new_states = self._checkpoint_function()(run, inputs, *flat_states)
        for index, layer in enumerate(layers):
            layer.set_state(new_states[index * width : (index + 1) * width], layout.after)
            layer.written_with = (layout.segment_length, layout.memory_update)
        return block

    def _checkpoint_function(self) -> Callable:
        """What Transformers checkpoints with, without the reentrant kind."""
        checkpoint = self._gradient_checkpointing_func
        if getattr(checkpoint, "keywords", {}).get("use_reentrant"):
            logger.warning_once(
                "`use_reentrant=True` has no effect: ids, which a block starts from, have no gradient."
            )
            checkpoint = partial(checkpoint, use_reentrant=False)
        return checkpoint

    def _loss_in_parts(self, block_loss: Callable[[torch.Tensor, slice], torch.Tensor]) -> Callable:
        """`block_loss` of a block that is longer than others, with the logits of no more tokens at once than theirs."""

        def loss(hidden_states: torch.Tensor, columns: slice) -> torch.Tensor:
            checkpointing = self.gradient_checkpointing and self.training
            run = partial(self._checkpoint_function(), block_loss) if checkpointing else block_loss
            losses, stop = [], columns.start
            for part in hidden_states.split(self.config.block_length, dim=1):
                start, stop = stop, stop + part.shape[1]
                losses.append(run(part, columns=slice(start, stop)))
            return sum(losses)

        return loss

    def _check_cache(self, cache: Cache | None, batch_size: int) -> Timeline:
        """The timeline of the cache, if it is one that this model can go on with."""
        if cache is None:
            return Timeline.start(batch_size)
        if not isinstance(cache, Cache) or not all(isinstance(layer, InfiniCacheLayer) for layer in cache.layers):
            raise ValueError(
                f"`past_key_values` is a {type(cache).__name__}, which cannot hold a compressive memory. Pass "
                "`InfiniCache(model.config)`, or nothing."
            )
        config = self.config
        if len(cache.layers) != config.num_hidden_layers:
            raise ValueError(
                f"`past_key_values` has {len(cache.layers)} layers, the model {config.num_hidden_layers}. Build it with "
                "`InfiniCache(model.config)`."
            )
        if cache.offloading:
            raise ValueError(
                "`past_key_values` is an offloaded cache. The memory is small and stays where its layer is: pass "
                "`InfiniCache(model.config)`, or nothing."
            )
        layer = cache.layers[0]
        if layer.timeline is None:
            return Timeline.start(batch_size)
        for name, written, now in zip(
            ("segment_length", "memory_update"),
            layer.written_with,
            (config.segment_length, config.memory_update),
            strict=True,
        ):
            if written != now:
                raise ValueError(
                    f"`past_key_values` was written with {name}={written!r}, but the model's config now says {now!r}. "
                    "Set it back, or start with a new cache."
                )
        if layer.batch_size != batch_size:
            raise ValueError(
                f"`past_key_values` holds {layer.batch_size} rows, the input {batch_size}. To ask many questions about "
                f"one text, repeat the cache first: `cache.batch_repeat_interleave({batch_size})`."
            )
        return layer.timeline

    @staticmethod
    def _check_mask_and_positions(
        attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, batch_size: int, num_columns: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Both for the new columns, (batch, columns) on the CPU; a bool for the mask."""
        if attention_mask is not None:
            if attention_mask.dim() != 2:
                raise ValueError(
                    f"`attention_mask` has the shape {tuple(attention_mask.shape)}. Give a padding mask (batch, tokens): "
                    "which token sees which follows from the segments."
                )
            if attention_mask.shape[0] != batch_size or attention_mask.shape[1] < num_columns:
                raise ValueError(
                    f"`attention_mask` has the shape {tuple(attention_mask.shape)}, the input "
                    f"{(batch_size, num_columns)}. It must cover the input, and may cover what came before it."
                )
            attention_mask = attention_mask[:, -num_columns:].bool().cpu()
        if position_ids is not None:
            if position_ids.dim() != 2 or position_ids.shape not in ((batch_size, num_columns), (1, num_columns)):
                raise ValueError(
                    f"`position_ids` has the shape {tuple(position_ids.shape)}, the input {(batch_size, num_columns)}. "
                    "Give one position per token, or leave it out."
                )
            position_ids = position_ids.cpu().long().expand(batch_size, -1)
        return attention_mask, position_ids


def local_attention_mask(config: InfiniLlamaConfig, layout: Layout, hidden_states: torch.Tensor):
    """The mask of local attention, in the form that the attention implementation wants; None where it needs none."""
    slots = layout.query_slots
    if slots is None:
        # Plain causal attention; one row of mask serves all. Its offset is 0 except when a segment is continued.
        rows, width = 1, layout.rotary_positions.shape[1] if layout.num_segments == 0 else layout.key_width
        mask_function, padding_mask = causal_mask_function, None
    else:
        rows, width = slots.shape

        def mask_function(row: int, head: int, query: int, key: int) -> bool:
            return key <= slots[row, query]

        # Flash attention knows padding only; it gets here with one query per row, all of whose keys come before it.
        padding_mask = (
            torch.arange(layout.key_width, device=slots.device) <= slots
            if is_flash_attention_requested(config)
            else None
        )
    return ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
        batch_size=rows,
        q_length=width,
        kv_length=layout.key_width,
        q_offset=layout.query_offset,
        kv_offset=0,
        mask_function=mask_function,
        attention_mask=padding_mask,
        allow_is_causal_skip=slots is None,
        dtype=hidden_states.dtype,
        device=hidden_states.device,
        config=config,
    )


def _join_tokens(blocks: list[tuple[torch.Tensor, ...] | None], dim: int) -> tuple[torch.Tensor, ...] | None:
    """Per layer, the outputs of all blocks side by side; weights over fewer slots are filled up with zeros."""
    if blocks[0] is None:
        return None
    if len(blocks) == 1:
        return blocks[0]
    joined = []
    for layer in zip(*blocks, strict=True):
        width = max(x.shape[-1] for x in layer)
        joined.append(torch.cat([nn.functional.pad(x, (0, width - x.shape[-1])) for x in layer], dim=dim))
    return tuple(joined)


class InfiniLlamaForCausalLM(InfiniLlamaPreTrainedModel, LlamaForCausalLM):
    """A language model that reads texts of any length; for all else, what Transformers says of `LlamaForCausalLM` holds.

    Args:
        config: its shape, and how it remembers.

    Example:

    ```python
    >>> model = InfiniLlamaForCausalLM.from_pretrained("infini-smollm2")  # a folder of scripts/convert.py
    >>> output = model.generate(ids, max_new_tokens=50)
    ```
    """

    def __init__(self, config: InfiniLlamaConfig):
        super(LlamaForCausalLM, self).__init__(config)  # as in InfiniLlamaModel
        self.model = InfiniLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: InfiniCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: InfiniCache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Llama's forward; see [`InfiniLlamaModel.forward`] for the inputs.

        All logits of a long input are the largest tensor by far. With labels they are built one block at a time, and
        given up, when `logits_to_keep` asks for few of them, and in training with gradient checkpointing.

        Args:
            labels: (batch, tokens), -100 where there is no target. They are shifted inside.
            logits_to_keep: return the logits of this many last tokens, or of the tokens with these indices; the loss is
                that of all tokens in the first case. 0 returns all, or, with labels in training with gradient
                checkpointing, none.
            kwargs: also go to the loss function: `num_items_in_batch`, by which the sum of the losses is divided instead
                of the number of targets, and `shift_labels`, targets that are shifted already, so that a text which is
                given in several calls loses none between them. Tensors (batch, tokens) are cut into blocks like labels.

        Returns:
            `loss` if there are labels, `logits` (batch, tokens kept, vocab_size) or None, `past_key_values`.
        """
        targets = kwargs.get("shift_labels")
        if kwargs.get("context_group") is not None and (labels is not None or targets is not None):
            if targets is None or kwargs.get("num_items_in_batch") is None:
                raise ValueError(
                    "`labels` of a span lack the first token of the next one, and its loss the number of targets in all of "
                    "them. With `context_group`, pass `shift_labels` and `num_items_in_batch`, as `shard_sequence` "
                    "returns them."
                )
        if targets is None and labels is not None:
            targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        few_logits = isinstance(logits_to_keep, int) and logits_to_keep > 0
        if targets is not None and (few_logits or (self.training and self.model.gradient_checkpointing)):
            block_loss = self._block_loss(targets, kwargs)
        else:
            block_loss = None
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache if past_key_values is None else past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep if isinstance(logits_to_keep, int) else 0,
            block_loss=block_loss,
            **kwargs,
        )
        logits, loss = None, outputs.loss
        if outputs.last_hidden_state is not None:
            logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        if targets is not None and block_loss is None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _block_loss(self, targets: torch.Tensor, kwargs: dict) -> Callable[[torch.Tensor, slice], torch.Tensor]:
        """The share of a block in the loss, whose sum over blocks is the loss of all `targets` (batch, tokens)."""
        num_items = kwargs.get("num_items_in_batch")
        if num_items is None:
            num_items = (targets != kwargs.get("ignore_index", -100)).sum()

        def block_loss(hidden_states: torch.Tensor, columns: slice) -> torch.Tensor:
            cut = {
                name: x[:, columns] if torch.is_tensor(x) and x.shape[:2] == targets.shape else x
                for name, x in kwargs.items()
            }
            cut |= {"shift_labels": targets[:, columns].contiguous(), "num_items_in_batch": num_items}
            logits = self.lm_head(hidden_states)
            return self.loss_function(logits=logits, labels=None, vocab_size=self.config.vocab_size, **cut)

        return block_loss

    # Hooks of `generate`.

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: dict) -> None:
        """No position ids: each row goes on where the cache stands, whatever its padding.

        `generate` takes inputs that are no longer than the cache for new ones only if an attention mask says so. Text
        that is asked about is nearly always longer than the question, so we say so where the caller did not.
        """
        cache, mask = model_kwargs.get(CACHE), model_kwargs.get("attention_mask")
        if (
            cache is not None
            and mask is not None
            and inputs_tensor.shape[1] == mask.shape[1] <= cache.get_seq_length()
        ):
            seen = mask.new_ones(mask.shape[0], cache.get_seq_length())
            model_kwargs["attention_mask"] = torch.cat([seen, mask], dim=1)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict, *args, **kwargs
    ) -> None:
        """The cache that `generate` starts with is an [`InfiniCache`]."""
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic"):
            raise ValueError(
                f"`cache_implementation={implementation!r}` cannot hold a compressive memory. Leave it out: the cache of "
                "this model has a fixed size as it is."
            )
        generation_config.cache_implementation = None
        if generation_config.use_cache and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = InfiniCache(self.config)
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _prefill(
        self, input_ids: torch.LongTensor, generation_config: GenerationConfig, model_kwargs: dict, *args, **kwargs
    ) -> CausalLMOutputWithPast:
        """Move padding on the right to the left, so that the last column holds the last token of each row.

        `generate` goes on from the last column. Padding has no position, so where it is changes nothing else.
        """
        mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get(CACHE)
        if mask is not None and model_kwargs.get("inputs_embeds") is None and not bool(mask[:, -1].all()):
            new = input_ids.shape[1]
            if cache is not None and mask.shape[1] == new:
                new -= cache.get_seq_length()  # the ids begin with those that the cache has seen
            order = mask[:, -new:].argsort(dim=1, stable=True)
            input_ids = torch.cat([input_ids[:, :-new], input_ids[:, -new:].gather(1, order)], dim=1)
            mask = torch.cat([mask[:, :-new], mask[:, -new:].gather(1, order)], dim=1)
            model_kwargs = model_kwargs | {"attention_mask": mask}
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """Refused: pages of keys and values cannot hold a memory."""
        raise ValueError(
            "Continuous batching pages keys and values, and cannot hold a compressive memory. Use `generate` with a batch."
        )

    def generate_batch(self, *args, **kwargs):
        """Refused, as `init_continuous_batching`. `generate` takes batches."""
        return self.init_continuous_batching()


class InfiniLlamaForSequenceClassification(GenericForSequenceClassification, InfiniLlamaPreTrainedModel):
    """A head that classifies each text by its last token."""


if not __name__.startswith("transformers_modules."):
    # Code that came with a model repo serves that repo alone: the next one may come with another version.
    AutoConfig.register(InfiniLlamaConfig.model_type, InfiniLlamaConfig, exist_ok=True)
for auto_class, model_class in (
    (AutoModel, InfiniLlamaModel),
    (AutoModelForCausalLM, InfiniLlamaForCausalLM),
    (AutoModelForSequenceClassification, InfiniLlamaForSequenceClassification),
):
    auto_class.register(InfiniLlamaConfig, model_class, exist_ok=True)
    model_class.register_for_auto_class(auto_class.__name__)
