"""Plain `generate()`: for every strategy, batch and cache, the text is that of full forwards, step by step."""

import copy
from pathlib import Path

import pytest
import torch
from tiny import base_llama, random_ids, rounding, tiny_model
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import DynamicCache, PreTrainedTokenizerFast, pipeline
from transformers.generation.streamers import BaseStreamer

from infini_llama.cache_infini import InfiniCache
from infini_llama.modeling_infini import CACHE, InfiniLlamaForCausalLM

RULES = ["linear", "delta", "least_squares", "none"]
N = 5  # the segment length of the tiny model
# Long enough for two boundaries and more, whatever the length of the prompt.
NEW_TOKENS = 2 * N + 3
# One before, at, one after and two times the end of a segment, and the shortest prompt there is.
LENGTHS = [1, N - 1, N, N + 1, 2 * N]


@torch.no_grad()
def greedy(model: InfiniLlamaForCausalLM, ids: torch.Tensor, num_tokens: int = NEW_TOKENS) -> torch.Tensor:
    """What greedy decoding is: the best next token of a full forward, without cache or padding, again and again."""
    for _ in range(num_tokens):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def generate(model: InfiniLlamaForCausalLM, ids: torch.Tensor | None = None, **kwargs):
    """Greedy, unless something else is asked for."""
    return model.generate(ids, **{"max_new_tokens": NEW_TOKENS, "do_sample": False} | kwargs)


def pad_left(texts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of texts (1, T) of different lengths."""
    width = max(text.shape[1] for text in texts)
    pad = torch.nn.functional.pad
    ids = torch.cat([pad(text, (width - text.shape[1], 0)) for text in texts])
    return ids, torch.cat([pad(torch.ones_like(text), (width - text.shape[1], 0)) for text in texts])


def read(model: InfiniLlamaForCausalLM, ids: torch.Tensor, **kwargs) -> InfiniCache:
    cache = InfiniCache(model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache, **kwargs)
    return cache


# One text


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("rule", RULES)
def test_greedy_text_is_the_argmax_of_full_forwards(rule: str, length: int) -> None:
    """Every token is the best one of a full forward over all before it, across several boundaries."""
    model, ids = tiny_model(memory_update=rule), random_ids(1, length)
    text = generate(model, ids)
    assert torch.equal(text, greedy(model, ids))
    if rule != "none":
        assert len(text[0, length:].unique()) > 3, "a text that repeats itself would hide errors"
        model.config.memory_update = "none"
        assert not torch.equal(text, greedy(model, ids)), "the memory must matter"


@pytest.mark.parametrize("length", LENGTHS)
def test_a_single_token_can_be_generated(length: int) -> None:
    """`max_new_tokens=1` reads the prompt and no more; the cache holds the prompt and not the new token."""
    model, ids = tiny_model(), random_ids(1, length)
    output = generate(model, ids, max_new_tokens=1, return_dict_in_generate=True)
    assert torch.equal(output.sequences, greedy(model, ids, 1))
    assert output.past_key_values.get_seq_length() == length


@pytest.mark.parametrize(
    "kwargs",
    [{"do_sample": False}, {"do_sample": True}, {"num_beams": 2}, {"cache_implementation": "dynamic"}],
    ids=["greedy", "sampling", "beams", "dynamic"],
)
def test_the_cache_that_generate_builds_is_ours(kwargs: dict) -> None:
    """A call without `past_key_values` makes an `InfiniCache`, so does the explicit name of the library's default."""
    model, ids = tiny_model(), random_ids(1, 8)
    output = generate(model, ids, return_dict_in_generate=True, **kwargs)
    assert type(output.past_key_values) is InfiniCache
    assert output.past_key_values.get_seq_length() == 8 + NEW_TOKENS - 1
    assert type(model(ids).past_key_values) is InfiniCache


def test_a_cache_may_be_passed_under_its_old_and_its_new_name() -> None:
    """Transformers 5.24 renamed `past_key_values` to `cache`; a model takes both, with any version."""
    model, ids = tiny_model(), random_ids(1, 2 * N + 2)
    caches = [InfiniCache(model.config) for _ in range(2)]
    for part in ids.split(5, dim=1):
        old = model(part, past_key_values=caches[0])
        new = model(part, cache=caches[1])
        assert torch.equal(old.logits, new.logits)
    assert new[CACHE] is caches[1] and new.past_key_values is caches[1]
    answers = [generate(model, ids[:, :3], **{name: cache}) for name, cache in zip((CACHE, "past_key_values"), caches)]
    assert torch.equal(*answers)


def test_nothing_is_left_over_from_an_earlier_call() -> None:
    """Without a cache of the caller's, every call starts from an empty memory."""
    model, ids = tiny_model(), random_ids(2, 8)
    first = generate(model, ids)
    generate(model, random_ids(1, 12))
    assert torch.equal(generate(model, ids), first)


@pytest.mark.parametrize("length", [1, N, 2 * N + 2])
@pytest.mark.parametrize("rule", RULES)
def test_the_cache_changes_no_text(rule: str, length: int) -> None:
    """`use_cache=False`, which reads everything again for every token, gives the same text, also to a padded batch."""
    model = tiny_model(memory_update=rule)
    ids, mask = pad_left([random_ids(1, length), random_ids(1, 8)])
    texts = [generate(model, ids, attention_mask=mask, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_prompt_of_embeddings_gives_the_text_of_its_ids(length: int) -> None:
    """`inputs_embeds` in place of ids: the library returns the new tokens only, and they are the same."""
    model, ids = tiny_model(), random_ids(2, length)
    text = generate(model, inputs_embeds=model.get_input_embeddings()(ids))
    assert torch.equal(text, generate(model, ids)[:, length:])


# Strategies


@torch.no_grad()
def step_logits(model: InfiniLlamaForCausalLM, text: torch.Tensor, length: int) -> torch.Tensor:
    """The logits that chose each new token of a finished text, from one full forward."""
    return model(text, use_cache=False).logits[:, length - 1 : -1]


@pytest.mark.parametrize("rule", RULES)
def test_sampling_draws_from_the_logits_of_full_forwards(rule: str) -> None:
    """A seed gives the same text again, another seed another; the logits are those of a forward over the text."""
    model, ids = tiny_model(memory_update=rule), random_ids(2, 8)

    def sample(seed: int):
        torch.manual_seed(seed)
        kwargs = {"do_sample": True, "num_return_sequences": 3, "top_k": 0}
        return generate(model, ids, return_dict_in_generate=True, output_logits=True, **kwargs)

    output = sample(1)
    assert output.sequences.shape == (6, 8 + NEW_TOKENS)
    assert len(output.sequences.unique(dim=0)) == 6
    assert torch.equal(output.sequences, sample(1).sequences)
    assert not torch.equal(output.sequences, sample(2).sequences)
    expected = step_logits(model, output.sequences, 8)
    torch.testing.assert_close(torch.stack(output.logits, dim=1), expected, **rounding(rule))


@pytest.mark.parametrize("rule", RULES)
def test_beams_have_the_scores_of_full_forwards(rule: str) -> None:
    """Each returned beam's score is its log-probability by a forward over it; no cache, and a row alone, agree."""
    model, prompts = tiny_model(memory_update=rule), [random_ids(1, 8), random_ids(1, 3)]
    ids, mask = pad_left(prompts)
    kwargs = {"num_beams": 4, "num_return_sequences": 3, "return_dict_in_generate": True, "output_scores": True}
    output = generate(model, ids, attention_mask=mask, length_penalty=0.0, **kwargs)
    uncached = generate(model, ids, attention_mask=mask, length_penalty=0.0, use_cache=False, **kwargs)
    assert torch.equal(output.sequences, uncached.sequences)
    for row, prompt in enumerate(prompts):
        new = output.sequences[3 * row : 3 * row + 3, ids.shape[1] :]
        assert len(new.unique(dim=0)) == 3
        text = torch.cat([prompt.expand(3, -1), new], dim=1)
        log_probs = step_logits(model, text, prompt.shape[1]).log_softmax(-1)
        scores = log_probs.gather(2, new[:, :, None]).sum((1, 2))
        # Sums of thirteen log-probabilities.
        torch.testing.assert_close(output.sequences_scores[3 * row : 3 * row + 3], scores, rtol=1e-5, atol=1e-4)
        assert torch.equal(generate(model, prompt, length_penalty=0.0, **kwargs).sequences, text)
    best = generate(model, prompts[0], num_beams=4, length_penalty=0.0)
    assert not torch.equal(best, generate(model, prompts[0])), "beams that change places never would prove nothing"


def test_beams_go_on_from_a_repeated_cache() -> None:
    """A cache of the caller's serves beam search once it is repeated, as the error for one that is not says."""
    model, text, question = tiny_model(), random_ids(1, 12), random_ids(1, 3)
    cache = read(model, text)
    with pytest.raises(ValueError, match=r"holds 1 rows, the input 4.*`cache.batch_repeat_interleave\(4\)`"):
        generate(model, question, past_key_values=copy.deepcopy(cache), num_beams=4)
    cache.batch_repeat_interleave(4)
    expected = generate(model, torch.cat([text, question], dim=1), num_beams=4)[:, 12:]
    assert torch.equal(generate(model, question, past_key_values=cache, num_beams=4), expected)


class Collect(BaseStreamer):
    def __init__(self):
        self.pieces, self.has_ended = [], False

    def put(self, value: torch.Tensor) -> None:
        assert not self.has_ended
        self.pieces.append(value.flatten())

    def end(self) -> None:
        self.has_ended = True


def test_a_streamer_gets_the_prompt_and_then_every_token() -> None:
    """Tokens are streamed one by one as they come, none twice and none left out."""
    model, ids, streamer = tiny_model(), random_ids(1, 8), Collect()
    text = generate(model, ids, streamer=streamer)
    assert [len(piece) for piece in streamer.pieces] == [8] + [1] * NEW_TOKENS
    assert torch.equal(torch.cat(streamer.pieces), text[0])
    assert streamer.has_ended


# Batches of unequal rows


@pytest.mark.parametrize("explicit", [True, False], ids=["mask", "mask from the padding token"])
@pytest.mark.parametrize("rule", RULES)
def test_rows_padded_left_get_the_text_that_they_get_alone(rule: str, explicit: bool) -> None:
    """Each row crosses its boundaries at its own steps, and no row's text depends on the others."""
    model, prompts = tiny_model(memory_update=rule), [random_ids(1, length) for length in (1, 4, 5, 8, 13)]
    ids, mask = pad_left(prompts)
    texts = generate(model, ids, **({"attention_mask": mask} if explicit else {}))
    for prompt, text in zip(prompts, texts):
        assert torch.equal(text[-prompt.shape[1] - NEW_TOKENS :], greedy(model, prompt)[0])


@pytest.mark.parametrize("chunk_size", [1, 3, N, 7, 1000])
def test_a_prompt_read_in_chunks_gives_the_same_text(chunk_size: int) -> None:
    """`prefill_chunk_size` bounds the memory of `generate` and nothing else, also where a chunk is all padding."""
    model = tiny_model()
    ids, mask = pad_left([random_ids(1, length) for length in (2, 11, 23)])
    expected = generate(model, ids, attention_mask=mask)
    assert torch.equal(generate(model, ids, attention_mask=mask, prefill_chunk_size=chunk_size), expected)
    assert torch.equal(generate(model, ids[2:], prefill_chunk_size=chunk_size), expected[2:])


@pytest.mark.parametrize("rule", RULES)
def test_rows_padded_right_go_on_where_their_own_text_ends(rule: str) -> None:
    """Right padding in `forward`: the next token of a row follows its last one, and decoding goes on from there."""
    model, prompts = tiny_model(memory_update=rule), [random_ids(1, length) for length in (1, 4, 5, 8, 13)]
    lengths = torch.tensor([prompt.shape[1] for prompt in prompts])
    mask = (torch.arange(13) < lengths[:, None]).long()
    ids = torch.cat([torch.nn.functional.pad(prompt, (0, 13 - prompt.shape[1])) for prompt in prompts])
    with torch.no_grad():
        output = model(ids, attention_mask=mask)
        tokens = output.logits[torch.arange(5), lengths - 1].argmax(-1, keepdim=True)
        texts = [tokens]
        for _ in range(NEW_TOKENS - 1):
            tokens = model(tokens, past_key_values=output.past_key_values).logits.argmax(-1)
            texts.append(tokens)
    for prompt, text in zip(prompts, torch.cat(texts, dim=1)):
        assert torch.equal(text, greedy(model, prompt)[0, prompt.shape[1] :])


def test_rows_padded_right_get_the_text_that_they_get_alone() -> None:
    """`generate` with padding on the right: each row goes on from its own last token."""
    model, prompts = tiny_model(), [random_ids(1, length) for length in (4, 8, 13)]
    mask = (torch.arange(13) < torch.tensor([4, 8, 13])[:, None]).long()
    ids = torch.cat([torch.nn.functional.pad(prompt, (0, 13 - prompt.shape[1])) for prompt in prompts])
    texts = generate(model, ids, attention_mask=mask)[:, 13:]
    for prompt, text in zip(prompts, texts):
        assert torch.equal(text, greedy(model, prompt)[0, prompt.shape[1] :])


def test_rows_that_end_early_do_not_disturb_the_others() -> None:
    """Each row stops at its own end token, gets padding from there on, and the others go on as alone."""
    model, prompts = tiny_model(), [random_ids(1, length) for length in (4, 8, 13)]
    alone = [greedy(model, prompt)[0, prompt.shape[1] :].tolist() for prompt in prompts]
    steps = {token: [row.index(token) if token in row else NEW_TOKENS for row in alone] for token in alone[0]}
    end = next(token for token in alone[0] if 1 < min(steps[token]) < max(steps[token]))
    ids, mask = pad_left(prompts)
    texts = generate(model, ids, attention_mask=mask, eos_token_id=end)[:, 13:].tolist()
    for text, row, step in zip(texts, alone, steps[end]):
        assert len(text) == min(max(steps[end]) + 1, NEW_TOKENS)
        assert text == (row[: step + 1] + [0] * NEW_TOKENS)[: len(text)]


# Going on from a cache


TURNS = ["full ids", "full ids and mask", "new ids", "new ids and their mask", "new ids and full mask"]


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("lengths", [(8,), (2, 8, 13)], ids=["one", "batch"])
def test_a_second_turn_goes_on_from_the_returned_cache(lengths: tuple, turn: str, chunk_size: int | None) -> None:
    """A chat goes on with all its ids, as is usual, or with the new ones only; padded rows go on as if alone."""
    model, prompts = tiny_model(), [random_ids(1, length) for length in lengths]
    ids, mask = pad_left(prompts)
    kwargs = {"return_dict_in_generate": True, "prefill_chunk_size": chunk_size}
    first = generate(model, ids, attention_mask=mask, **kwargs)
    cache, answer = first.past_key_values, first.sequences[:, ids.shape[1] :]
    assert (answer != 0).all(), "the padding token must not be taken for padding where there is no mask"
    question, question_mask = pad_left([random_ids(1, length) for length in range(1, len(prompts) + 1)])
    # The last token of the answer has been chosen and not been read: it comes with the question.
    new_ids = torch.cat([answer[:, -1:], question], dim=1)
    new_mask = torch.cat([torch.ones_like(answer[:, -1:]), question_mask], dim=1)
    full_ids = torch.cat([first.sequences[:, :-1], new_ids], dim=1)
    full_mask = torch.cat([mask, torch.ones_like(answer[:, :-1]), new_mask], dim=1)
    inputs = {
        "full ids": (full_ids, None),
        "full ids and mask": (full_ids, full_mask),
        "new ids": (new_ids, None),
        "new ids and their mask": (new_ids, new_mask),
        "new ids and full mask": (new_ids, full_mask),
    }
    second_ids, second_mask = inputs[turn]
    second = generate(model, second_ids, attention_mask=second_mask, past_key_values=cache, **kwargs)
    assert second.past_key_values is cache
    assert cache.get_seq_length() == full_ids.shape[1] + NEW_TOKENS - 1
    for row in range(len(prompts)):
        expected = greedy(model, full_ids[row : row + 1, full_mask[row] == 1])
        assert torch.equal(second.sequences[row, -NEW_TOKENS:], expected[0, -NEW_TOKENS:])


@pytest.mark.parametrize("length", [3, 30])
def test_a_question_of_any_length_goes_on_from_a_text_that_was_read(length: int) -> None:
    """New ids with the mask of everything are new ids, also where they are longer than what the cache has read."""
    model, text, question = tiny_model(), random_ids(1, 12), random_ids(1, length)
    mask = torch.ones(1, 12 + length)
    answer = generate(model, question, attention_mask=mask, past_key_values=read(model, text))
    expected = greedy(model, torch.cat([text, question], dim=1))
    assert torch.equal(answer, expected[:, 12:])


def test_a_question_with_positions_needs_a_mask_and_the_error_says_so() -> None:
    """With `position_ids`, `generate` leaves the mask to the caller."""
    model, text, question = tiny_model(), random_ids(1, 12), random_ids(1, 3)
    options = {"past_key_values": read(model, text), "position_ids": torch.arange(12, 15)[None]}
    with pytest.raises(ValueError, match="`attention_mask` covers both: with `position_ids` give it too"):
        generate(model, question, **options)
    answer = generate(model, question, attention_mask=torch.ones(1, 15), **options)
    assert torch.equal(answer, greedy(model, torch.cat([text, question], dim=1))[:, 12:])


@pytest.mark.parametrize("rule", RULES)
def test_a_prefix_is_read_once_and_serves_many_prompts(rule: str) -> None:
    """The library's recipe for prefix caching: a copy of the prefix's cache, and prompts that repeat the prefix."""
    model, prefix = tiny_model(memory_update=rule), random_ids(1, 12)
    cache = read(model, prefix)
    for _ in range(2):
        prompt = torch.cat([prefix, random_ids(1, 3)], dim=1)
        assert torch.equal(generate(model, prompt, past_key_values=copy.deepcopy(cache)), greedy(model, prompt))


@pytest.mark.parametrize("repeated", [True, False], ids=["at once", "one after the other"])
@pytest.mark.parametrize("length", [10, 12])
@pytest.mark.parametrize("rule", RULES)
def test_many_questions_about_one_saved_text(rule: str, length: int, repeated: bool, tmp_path: Path) -> None:
    """A loaded memory answers questions of any length, in a batch or one by one, as if each came with the text."""
    model, text = tiny_model(memory_update=rule), random_ids(1, length)
    questions = [random_ids(1, size) for size in (1, 7, 3)]
    read(model, text).save(tmp_path / "memory.safetensors")
    cache = InfiniCache.load(tmp_path / "memory.safetensors", model)
    if repeated:
        cache.batch_repeat_interleave(3)
        ids, mask = pad_left(questions)
        answers = generate(model, ids, attention_mask=mask, past_key_values=cache)
    else:
        answers = [generate(model, ids, past_key_values=copy.deepcopy(cache))[0] for ids in questions]
    for question, answer in zip(questions, answers):
        expected = greedy(model, torch.cat([text, question], dim=1))
        assert torch.equal(answer[-NEW_TOKENS:], expected[0, -NEW_TOKENS:])


# What is refused


@pytest.mark.parametrize("name", ["static", "offloaded", "offloaded_static", "quantized"])
def test_cache_implementations_that_would_lose_the_memory_are_refused(name: str) -> None:
    """The error names the setting and the remedy, with a cache of the caller's and without."""
    model, ids = tiny_model(), random_ids(1, 8)
    for cache in (None, InfiniCache(model.config)):
        with pytest.raises(ValueError, match=f"`cache_implementation='{name}'` cannot hold.*Leave it out"):
            generate(model, ids, cache_implementation=name, past_key_values=cache)


def test_assisted_decoding_is_refused() -> None:
    """Tokens that were read cannot be taken back: the library says so for both kinds of speculation."""
    model = tiny_model()
    for kwargs in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": base_llama(model)}):
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            generate(model, random_ids(1, 8), **kwargs)


def test_other_caches_are_refused() -> None:
    """A `DynamicCache()` without config would drop the memory; the error names the right cache."""
    model = tiny_model()
    with pytest.raises(ValueError, match=r"Build it with `InfiniCache\(model.config\)`"):
        generate(model, random_ids(1, 8), past_key_values=DynamicCache())


def test_continuous_batching_is_refused() -> None:
    """Paged caches hold keys and values only: they are refused, and the model works as before."""
    model, ids = tiny_model(), random_ids(1, 8)
    expected = generate(model, ids)
    with pytest.raises(ValueError, match="Continuous batching"):
        generate(model, ids, cache_implementation="paged")
    with pytest.raises(ValueError, match="Continuous batching"):
        model.generate_batch(ids.tolist(), max_new_tokens=3)
    assert torch.equal(generate(model, ids), expected)


# The library's front door


def test_the_text_generation_pipeline_works() -> None:
    """`pipeline("text-generation")` gives the greedy text, for one prompt and for a padded batch of them."""
    letters = "_abcdefghijklmnopqrstuvwxyzABCD"
    tokenizer = Tokenizer(WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="_"))
    tokenizer.pre_tokenizer, tokenizer.decoder = Split(Regex("."), "isolated"), Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="_", unk_token="_", padding_side="left")
    model, prompts = tiny_model(), ["ab", "gjCikaDbdddbb"]

    def expected(prompt: str) -> str:
        ids = greedy(model, torch.tensor([[letters.index(letter) for letter in prompt]]))[0]
        return "".join(letters[i] for i in ids).replace("_", "")  # the pipeline leaves special tokens out

    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    assert [pipe(prompt, **kwargs)[0]["generated_text"] for prompt in prompts] == [expected(p) for p in prompts]
    outputs = pipe(prompts, batch_size=2, **kwargs)
    assert [output[0]["generated_text"] for output in outputs] == [expected(p) for p in prompts]
