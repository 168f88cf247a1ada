"""Passkeys and needles for lm-evaluation-harness (PyPI `lm-eval`), which has to be installed beside this project.

    lm-eval run --model hf --model_args pretrained=./trained,trust_remote_code=True,max_length=200000 \\
        --include_path scripts/lm_eval_tasks --tasks infini_passkey,infini_needle --metadata '{"lengths": [4096, 131072]}'

The harness cuts the start off prompts that are longer than the model's `max_position_embeddings`; an InfiniLlama reads on,
so `max_length` has to be larger than the longest prompt. Decoding is greedy, and `exact_match` is that of the whole answer.

`--metadata` takes `lengths`, `depths`, `samples` (of each length and depth) and `seed`; for `infini_needle` also
`haystack` (a text file or a folder of them), `values` and `num_needles`. `scripts/evaluate.py` asks the same, faster: the
harness reads each sample from its start. Prompts are text here, so that a length is right up to a few tokens.
"""

import random
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from infini_llama.scripts.generate import open_text
from infini_llama.scripts.retrieval_tasks import Needle, Passkey, RetrievalTask

__all__ = ["needle", "passkey"]


def passkey(**options: Any) -> dict[str, Dataset]:
    """The samples of `infini_passkey`; the options are the harness' model arguments and metadata."""
    return samples(Passkey(tokenizer_of(options)), **options)


def needle(
    *, haystack: str | None = None, values: str = "numbers", num_needles: int = 1, **options: Any
) -> dict[str, Dataset]:
    """The samples of `infini_needle`, in the text of `haystack`; without it, in sentences that repeat."""
    text = None if haystack is None else "".join(open_text(haystack))
    task = Needle(tokenizer_of(options), haystack=text, values=values, num_needles=num_needles)
    return samples(task, **options)


def tokenizer_of(options: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer by which lengths are counted, of the harness' `--model_args`."""
    name = options.get("tokenizer") or options.get("pretrained")
    if name is None:
        raise ValueError("tokenizer is missing: name the model in --model_args, as pretrained=, or in --metadata")
    return AutoTokenizer.from_pretrained(name, trust_remote_code=bool(options.get("trust_remote_code")))


def samples(
    task: RetrievalTask,
    *,
    lengths: Sequence[int] = (4096,),
    depths: Sequence[float] = (0, 0.5, 1),
    samples: int = 20,
    seed: int = 0,
    **_: Any,
) -> dict[str, Dataset]:
    """Draw samples of each length and depth; the same ones for the same seed."""
    rows = []
    for length, depth, number in ((n, d, i) for n in lengths for d in depths for i in range(samples)):
        sample = task.sample(random.Random(f"{seed}/{length}/{depth}/{number}"), length, depth=depth)
        # The harness adds what begins a text by itself, and leaves out the full stop, at which answers end.
        prompt = task.tokenizer.decode(sample.ids[: sample.answer.start], skip_special_tokens=True)
        answer = task.tokenizer.decode(sample.ids[sample.answer]).strip().removesuffix(".")
        rows.append({"prompt": prompt, "answer": answer, "length": length, "depth": float(depth)})
    return {"test": Dataset.from_list(rows)}
