"""Configuration of InfiniLlama: Llama with Infini-attention (arXiv 2404.07143)."""

import math
from typing import Any, Literal

from huggingface_hub.dataclasses import as_validated_field, strict
from transformers import LlamaConfig
from transformers.utils import logging

__all__ = ["InfiniLlamaConfig"]

logger = logging.get_logger(__name__)

LAYER_TYPE = "infini_attention"
AUTO_MAP = {
    "AutoConfig": "configuration_infini.InfiniLlamaConfig",
    "AutoModel": "modeling_infini.InfiniLlamaModel",
    "AutoModelForCausalLM": "modeling_infini.InfiniLlamaForCausalLM",
    "AutoModelForSequenceClassification": "modeling_infini.InfiniLlamaForSequenceClassification",
}


@as_validated_field
def at_least_one(value: int | None):
    """Validates a number of things of which there must be one, on assignment too."""
    if value is not None and value < 1:
        raise ValueError(f"Value must be at least 1, got {value}.")


@strict
class InfiniLlamaConfig(LlamaConfig):
    r"""
    Every field of [`LlamaConfig`], and:

    Args:
        segment_length (`int`, *optional*, defaults to 2048):
            Tokens per segment, N in the paper. Local attention and the rotary positions never leave a segment, so
            keep it within `max_position_embeddings`, the range that the base model was trained on.
        memory_update (`str`, *optional*, defaults to `"delta"`):
            How a completed segment is written into the memory: `"linear"` (equation 8), `"delta"` (equation 9),
            `"least_squares"` (not in the paper: repetition changes nothing, so what was written once is not outgrown by
            what comes later), or `"none"`: no memory, local attention only, which is the control in every evaluation.
        gate_init (`float`, *optional*, defaults to -3.0):
            Initial beta of equation 10, one per query head. `sigmoid(beta)` is the share of the memory in the output
            of a head. At -3.0 it is 5 %, with which a converted, untrained model still writes sensible text beyond a
            segment; 0.0 gives both sides half, from which gates have the shortest way to go in training.
        write_gate (`bool`, *optional*, defaults to `False`):
            Whether each key/value head learns how strongly it writes a token, sigmoid(w x + b) of the token's hidden state
            x (not in the paper): a text may pass without a trace, and what matters stays. It adds parameters.
        read_gate (`bool`, *optional*, defaults to `False`):
            Whether each query head learns for which tokens it reads: beta is b + w x / sqrt(hidden_size) of the token's hidden
            state x (not in the paper), b the beta of the paper and w = 0 at first. It adds parameters.
        block_segments (`int`, *optional*):
            How many segments go through a layer at once; by default as many as fit into 4096 tokens. It trades memory
            for speed and changes no result.
        layer_types (`list[str]`, *optional*):
            One entry per layer. Only `"infini_attention"` exists so far, and it is the default.

    `segment_length`, `memory_update` and `block_segments` may be changed on a loaded model's config between calls. A
    cache remembers what it was written with and refuses to be continued with something else.

    Raises:
        huggingface_hub.errors.StrictDataclassError: a field has the wrong type or is out of range; the message names it.
    """

    model_type = "infini_llama"

    segment_length: int = at_least_one(default=2048)
    memory_update: Literal["delta", "linear", "least_squares", "none"] = "delta"
    gate_init: float | int = -3.0
    write_gate: bool = False
    read_gate: bool = False
    block_segments: int | None = at_least_one(default=None)
    layer_types: list[str] | None = None

    def __post_init__(self, **kwargs):
        if self.layer_types is None:
            self.layer_types = [LAYER_TYPE] * self.num_hidden_layers
        # All of it, so that every auto class finds its model in a saved folder, whichever model was saved.
        kwargs.setdefault("auto_map", AUTO_MAP)
        super().__post_init__(**kwargs)
        trained_length = self.max_position_embeddings
        if self.rope_parameters.get("rope_type") == "longrope":
            # Beyond this length it changes the frequencies of all tokens of a call, however the call was cut.
            trained_length = self.rope_parameters.get("original_max_position_embeddings", trained_length)
        if self.segment_length > trained_length:
            logger.warning(
                f"`segment_length` ({self.segment_length}) exceeds the {trained_length} positions that the base model "
                "was trained on. Choose a shorter segment."
            )

    def to_dict(self) -> dict[str, Any]:
        """Without `layer_types` while all are the default: `Trainer` reads the config of a checkpoint that it resumes
        from as a plain `PreTrainedConfig`, which refuses the names of layers that it does not know.
        """
        fields = super().to_dict()
        if set(self.layer_types) == {LAYER_TYPE}:
            del fields["layer_types"]
        return fields

    @property
    def block_length(self) -> int:
        """Tokens of a row that go through a layer at once, a multiple of `segment_length`."""
        return self.segment_length * (self.block_segments or max(1, 4096 // self.segment_length))

    def validate_gate_init(self):
        """Part of `@strict`-powered validation: a gate that starts at infinity has no gradient, and stays there."""
        if not math.isfinite(self.gate_init):
            raise ValueError(f"`gate_init` is {self.gate_init}; it must be finite, for example -3.0.")

    def validate_layer_type(self):
        """Part of `@strict`-powered validation: Transformers does not know the name of our layers."""
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"`layer_types` has {len(self.layer_types)} entries but `num_hidden_layers` is "
                f"{self.num_hidden_layers}: give one entry per layer, or leave `layer_types` out."
            )
        unknown = sorted(set(self.layer_types) - {LAYER_TYPE})
        if unknown:
            raise ValueError(f"`layer_types` has the entries {unknown}; only '{LAYER_TYPE}' is implemented.")


InfiniLlamaConfig.register_for_auto_class()
