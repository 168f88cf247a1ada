"""Make the folder that `scripts/recipes/nano.yaml` starts from: a config of three million parameters, and a tokenizer.

    python scripts/make_nano.py ./nano
    python scripts/train.py scripts/recipes/nano.yaml --model ./nano --output ./nano-trained

The tokenizer is byte-level BPE with 1,024 tokens and single digits, learned from Python's own documentation and from the
sentences of the passkey task. There are no weights in the folder: `--from_scratch` begins with random ones.
"""

import argparse
import sys
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from infini_llama.configuration_infini import InfiniLlamaConfig
from infini_llama.scripts.retrieval_tasks import FILLER, INTRO

__all__ = ["nano_config", "nano_tokenizer"]

END = "<|endoftext|>"
PASSKEY = " The pass key is . Remember it. What is the pass key? The pass key is"


def nano_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*topics.values(), *[INTRO + FILLER + PASSKEY] * 200], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def nano_config() -> InfiniLlamaConfig:
    return InfiniLlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        segment_length=64,
        memory_update="least_squares",
        gate_init=0.0,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="folder for config and tokenizer")
    output = parser.parse_args(argv).output
    nano_config().save_pretrained(output)
    nano_tokenizer().save_pretrained(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
