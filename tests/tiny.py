"""Tiny random models for the tests, with weights large enough that attention and memory matter."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from infini_llama.configuration_infini import InfiniLlamaConfig
from infini_llama.modeling_infini import InfiniLlamaForCausalLM

VOCAB_SIZE = 31


def tiny_config(**overrides) -> InfiniLlamaConfig:
    """Two layers, four query heads on two key/value heads, segments of five tokens, blocks of three segments."""
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "segment_length": 5,
        "block_segments": 3,
        "attn_implementation": "sdpa",
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return InfiniLlamaConfig(**settings | overrides)


def tiny_model(**overrides) -> InfiniLlamaForCausalLM:
    """A random model in eval mode. Its gates differ from head to head, so that no head can stand in for another, and read and
    write gates from token to token.
    """
    model = InfiniLlamaForCausalLM(tiny_config(**overrides)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.memory_gate.bias.normal_()
            if model.config.read_gate:
                layer.self_attn.memory_gate.weight.normal_()
            if model.config.write_gate:
                layer.self_attn.write_gate.weight.normal_()
    return model


def base_llama(model: InfiniLlamaForCausalLM) -> LlamaForCausalLM:
    """The Llama with the same weights."""
    own = {
        "model_type",
        "architectures",
        "segment_length",
        "memory_update",
        "gate_init",
        "write_gate",
        "read_gate",
        "block_segments",
        "layer_types",
        "auto_map",
    }
    config = LlamaConfig(**{k: v for k, v in model.config.to_dict().items() if k not in own})
    config._attn_implementation = model.config._attn_implementation
    base = LlamaForCausalLM(config).to(model.dtype).eval()
    base.load_state_dict({k: v for k, v in model.state_dict().items() if "_gate." not in k})
    return base


def random_ids(*shape: int) -> torch.Tensor:
    """Token ids without the padding token 0."""
    return torch.randint(1, VOCAB_SIZE, shape)


def rounding(rule: str = "delta") -> dict[str, float]:
    """How far float32 logits of about 1 may be apart when sums are taken in another order: 2e-6 was seen, and 2e-5 for
    `least_squares`, which divides by r = 0.05; where a state is mixed up, it is 1e-1.
    """
    tolerance = 1e-4 if rule == "least_squares" else 1e-5
    return {"rtol": tolerance, "atol": tolerance}
