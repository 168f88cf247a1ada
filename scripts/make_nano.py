"""Make the folder that `scripts/recipes/nano.yaml` starts from: a config of three million parameters, and a tokenizer.

    python scripts/make_nano.py ./nano
    python scripts/train.py scripts/recipes/nano.yaml --model ./nano --output ./nano-trained

The tokenizer is byte-level BPE with 1,024 tokens and single digits, learned from Python's own documentation and from the
sentences of the passkey task. There are no weights in the folder: `--from_scratch` begins with random ones.

    python scripts/make_nano.py ./nano-pairs --pair-digits models/nano

gives a trained one a token for each pair of digits, to be trained on: the memory finds what to say next by what was said
last, and of the digits of a number one usually comes twice, of its pairs hardly ever. With

    python scripts/make_nano.py ./nano-words --words models/nano-needle stories.txt

the words of a text have a token each.
"""

import argparse
import itertools
import json
import re
import sys
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from infini_llama.configuration_infini import InfiniLlamaConfig
from infini_llama.modeling_infini import InfiniLlamaForCausalLM
from infini_llama.scripts.generate import InputError, load_model, open_text, say
from infini_llama.scripts.retrieval_tasks import FILLER, INTRO

__all__ = ["nano_config", "nano_tokenizer", "pair_digits", "whole_words"]

END = "<|endoftext|>"
DIGITS = "0123456789"
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


def pair_digits(
    model: InfiniLlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> tuple[InfiniLlamaForCausalLM, PreTrainedTokenizerFast]:
    """Give a model of single digits a token for each pair of them; `1234567` is then read as `12 34 56 7`.

    A pair's embedding is between those of its digits, nearer to the first one's, with some noise: no two are alike, and what
    the model knows of digits holds for them, more or less. It has to be trained.

    Returns:
        the same model, with 100 rows more in its embeddings, and another tokenizer.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary, splits = parts["model"]["vocab"], parts["pre_tokenizer"].get("pretokenizers", [])
    if not splits or splits[0] != {"type": "Digits", "individual_digits": True}:
        raise InputError("the tokenizer does not read single digits: give a model whose tokenizer make_nano.py wrote")
    splits[0] = {"type": "Split", "pattern": {"Regex": r"\d{1,2}"}, "behavior": "Isolated", "invert": False}
    singles = [vocabulary[digit] for digit in DIGITS]
    for pair in itertools.product(DIGITS, repeat=2):
        vocabulary["".join(pair)] = len(vocabulary)
        parts["model"]["merges"].append(list(pair))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)), eos_token=END, pad_token=END
    )
    model.resize_token_embeddings(len(vocabulary), mean_resizing=False)
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        mean = embeddings[singles].mean(0)
        of_digit = embeddings[singles] - mean
        noise = torch.randn(10, 10, len(mean), generator=torch.Generator().manual_seed(0))
        noise *= 0.5 * of_digit.norm(dim=-1).mean() / noise.norm(dim=-1, keepdim=True)
        embeddings[-100:] = (mean + 0.75 * of_digit[:, None] + 0.5 * of_digit + noise).flatten(0, 1)
    return model, tokenizer


def whole_words(
    model: InfiniLlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str
) -> tuple[InfiniLlamaForCausalLM, PreTrainedTokenizerFast]:
    """Give a model a token for each word of a text, with the space before it, that has several now.

    A word's embedding is the mean of its parts', with some noise: it has to be trained.

    Returns:
        both, changed: a row of the embeddings and a token more for each such word.
    """
    words = [f" {word}" for word in sorted(set(re.findall("[A-Za-z]+", text)))]
    parts = {word: tokenizer(word)["input_ids"] for word in words}
    parts = {word: ids for word, ids in parts.items() if len(ids) > 1}
    first = len(tokenizer)
    tokenizer.add_tokens(list(parts))
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        noise = torch.randn(len(parts), embeddings.shape[1], generator=torch.Generator().manual_seed(0))
        noise *= embeddings[:first].std()
        for row, ids in enumerate(parts.values()):
            embeddings[first + row] = embeddings[ids].mean(0) + noise[row]
    return model, tokenizer


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="folder to write")
    change = parser.add_mutually_exclusive_group()
    change.add_argument(
        "--pair-digits", metavar="MODEL", help="folder of a trained one that gets tokens for pairs of digits"
    )
    change.add_argument(
        "--words", nargs=2, metavar=("MODEL", "TEXT"), help="the same, for tokens of the words of a text file"
    )
    options = parser.parse_args(argv)
    if options.pair_digits is None and options.words is None:
        nano_config().save_pretrained(options.output)
        nano_tokenizer().save_pretrained(options.output)
        return 0
    try:
        if options.words is None:
            model, tokenizer = pair_digits(*load_model(options.pair_digits, dtype="float32"))
        else:
            text = "".join(open_text(options.words[1]))
            model, tokenizer = whole_words(*load_model(options.words[0], dtype="float32"), text)
    except InputError as error:
        say(f"error: {error}")
        return 2
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
