"""Configuration of InfiniLlama: Llama with Infini-attention (arXiv 2404.07143)."""

import math
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig
from transformers.utils import logging
from transformers.utils.type_validators import interval

__all__ = ["InfiniLlamaConfig"]

logger = logging.get_logger(__name__)

LAYER_TYPE = "infini_attention"
AUTO_MAP = {
    "AutoConfig": "configuration_infini.InfiniLlamaConfig",
    "AutoModel": "modeling_infini.InfiniLlamaModel",
    "AutoModelForCausalLM": "modeling_infini.InfiniLlamaForCausalLM",
    "AutoModelForSequenceClassification": "modeling_infini.InfiniLlamaForSequenceClassification",
}


@strict
class InfiniLlamaConfig(LlamaConfig):
    r"""
    Every field of [`LlamaConfig`], and:

    Args:
        segment_length (`int`, *optional*, defaults to 2048):
            Tokens per segment, N in the paper. Local attention and the rotary positions never leave a segment, so
            keep it within `max_position_embeddings`, the range that the base model was trained on.
        memory_update (`str`, *optional*, defaults to `"delta"`):
            How a completed segment is written into the memory: `"linear"` (equation 8), `"delta"` (equation 9), or
            `"none"`: no memory, local attention only, which is the control in every evaluation.
        gate_init (`float`, *optional*, defaults to 0.0):
            Initial beta of equation 10, one per query head. `sigmoid(beta)` is the share of the memory in the output
            of a head; 0.0 gives both sides half.
        block_segments (`int`, *optional*, defaults to 8):
            How many segments go through a layer at once. It trades memory for speed and changes no result.
        layer_types (`list[str]`, *optional*):
            One entry per layer. Only `"infini_attention"` exists so far, and it is the default.

    `segment_length`, `memory_update` and `block_segments` may be changed on a loaded model's config between calls. A
    cache remembers what it was written with and refuses to be continued with something else.

    Raises:
        huggingface_hub.errors.StrictDataclassError: a field has the wrong type or is out of range; the message names it.
    """

    model_type = "infini_llama"

    segment_length: int = interval(min=1)(default=2048)
    memory_update: Literal["delta", "linear", "none"] = "delta"
    gate_init: float | int = 0.0
    block_segments: int = interval(min=1)(default=8)
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

    def validate_gate_init(self):
        """Part of `@strict`-powered validation: a gate that starts at infinity has no gradient, and stays there."""
        if not math.isfinite(self.gate_init):
            raise ValueError(f"`gate_init` is {self.gate_init}; it must be finite, for example 0.0.")

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
