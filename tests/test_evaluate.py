"""`scripts/evaluate.py`: that shortcuts change no answer, that scores cannot be fooled, and that runs go on."""

import copy
import importlib.util
import json
import random
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_scripts import tiny_tokenizer
from tiny import base_llama, tiny_config, tiny_model
from torch.nn import functional as F
from torch.testing import assert_close

from infini_llama.cache_infini import InfiniCache
from infini_llama.modeling_infini import CACHE, InfiniLlamaForCausalLM
from infini_llama.scripts import evaluate, evaluation_report
from infini_llama.scripts.evaluation_tasks import (
    Haystack,
    Prompt,
    Question,
    Reader,
    Trunk,
    ask_local,
    bucket,
    bucket_label,
    effective_rank,
    go_on,
    hide,
    hide_stories,
    losses_by_segments,
    memory_growth,
    rouge,
    summary_prompt,
    take_tokens,
    window_prompt,
)
from infini_llama.scripts.generate import InputError
from infini_llama.scripts.retrieval_tasks import (
    Babilong,
    BabiStory,
    Needle,
    Passkey,
    babi_prompt,
    inner_ids,
    read_babi,
)

ROOT = Path(__file__).parent.parent
TOKENIZER = tiny_tokenizer()
N = 16
LENGTH = 700
STORIES = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Daniel went back to the hallway.
5 Mary moved to the garden.
6 Where is Mary? \tgarden\t5
1 John went to the office.
2 Where is John? \toffice\t1
"""
PROSE = "It was a dark night. Nobody came!\nWho would? The rain fell on roof and road. " * 12


def model_of(kind: str = "delta") -> torch.nn.Module:
    """A random model of ours with a write rule, or the plain Llama with the same weights."""
    torch.manual_seed(7)  # which says different things after different texts, whatever the rule
    ours = tiny_model(vocab_size=len(TOKENIZER), segment_length=N, block_segments=4, max_position_embeddings=1024)
    if kind != "llama":
        ours.config.memory_update = kind
        return ours
    return base_llama(ours)


def questions_of(task, length: int = LENGTH, depths: tuple[float, ...] = (0, 0.4, 1), samples: int = 2):
    """A haystack, and questions that share it."""
    haystack = Haystack.of(task, random.Random(0))
    drawn = {depth: [random.Random(f"{depth}/{i}") for i in range(samples)] for depth in depths}
    return haystack, [q for depth, rngs in drawn.items() for q in hide(task, haystack, rngs, length, depth)]


def ids_of(prompt: Prompt) -> torch.Tensor:
    return prompt[0 : len(prompt)]


def generated(model: torch.nn.Module, ids: torch.Tensor, num_tokens: int) -> list[int]:
    """What Transformers' own greedy decoding gives on the whole prompt at once."""
    # Without a mask, a text with the padding token in it would be taken for a padded one.
    options = {"attention_mask": torch.ones(1, len(ids)), "min_new_tokens": num_tokens, "do_sample": False}
    output = model.generate(ids[None], max_new_tokens=num_tokens, **options)
    return output[0, len(ids) :].tolist()


# Prompts


@settings(max_examples=60)
@given(st.data())
def test_the_nearest_place_is_the_nearest_of_all(data):
    """Against a list of all places, for every offset, length and target; no list is made for long texts."""
    size = data.draw(st.integers(1, 9))
    task = Needle(TOKENIZER, haystack=list(range(size)))
    task.cuts = sorted(data.draw(st.sets(st.integers(1, size), min_size=1)))
    room = data.draw(st.integers(0, 40))
    haystack = Haystack(torch.zeros(0), torch.arange(size), task.cuts, data.draw(st.sampled_from(task.cuts)))
    target = data.draw(st.floats(0, room))
    places = task.cuts_of_window(haystack.offset % size, room)
    assert abs(haystack.nearest_cut(target, room) - target) == min(abs(place - target) for place in places)


@pytest.mark.parametrize("count", [1, 3])
def test_a_prompt_is_a_haystack_with_needles_between_sentences(count):
    """Without what is inserted it is introduction, text and question; any piece of it is that of the whole."""
    task = Needle(TOKENIZER, haystack=PROSE, num_needles=count)
    haystack, questions = questions_of(task, depths=(0, 0.5, 1))
    for question in questions:
        prompt = question.prompt
        ids = ids_of(prompt).tolist()
        assert len(ids) == len(prompt) and len(prompt.spans) == count
        bare = list(ids)
        for start, stop in reversed(prompt.spans):
            assert TOKENIZER.decode(bare[start:stop]).startswith(" One of the special magic numbers")
            del bare[start:stop]
        text = bare[len(task.intro) : len(bare) - (len(prompt) - prompt.question)]
        assert bare[: len(task.intro)] == task.intro and text == task.window(haystack.offset, len(text))
        assert "mentioned in the provided text? The" in TOKENIZER.decode(ids[prompt.question :])
        value = TOKENIZER.decode(question.answer).strip()
        asked = next(span for span in prompt.spans if span[1] == question.evidence_end)
        assert f"is: {value}" in TOKENIZER.decode(ids[slice(*asked)])
        cut = random.Random(0).randrange(LENGTH)
        assert prompt[cut : cut + 50].tolist() == ids[cut : cut + 50]
        assert prompt[0 : prompt.shared].tolist() == Prompt(haystack, LENGTH, [], [])[0 : prompt.shared].tolist()
    starts = [q.prompt.spans[0][0] for q in questions]
    assert count > 1 or (starts == sorted(starts) and starts[0] == len(task.intro))


def test_ten_million_tokens_are_a_few_numbers():
    """Drawing a question costs the same at every length."""
    _, (question,) = questions_of(Passkey(TOKENIZER), length=10_000_000, depths=(0.5,), samples=1)
    prompt = question.prompt
    assert len(prompt) + len(question.answer) == 10_000_000 and len(prompt.parts) == 5
    assert f"key is{TOKENIZER.decode(question.answer)}" in TOKENIZER.decode(prompt[slice(*prompt.spans[0])])
    assert abs(prompt.spans[0][0] / len(prompt) - 0.5) < 0.001


def test_a_prompt_that_cannot_be_is_refused_with_the_length_that_can():
    with pytest.raises(InputError, match="length 20 is too short for a Passkey: give at least"):
        questions_of(Passkey(TOKENIZER), length=20)


def test_lengths_of_whole_segments_end_with_the_answer():
    """Prompts of a cell have one length, whatever their needles and answers, and the longest answer fills it up."""
    task = Needle(TOKENIZER, haystack=PROSE, values="words")
    _, questions = questions_of(task, depths=(0.5,), samples=5)
    assert len({len(question.answer) for question in questions}) > 1
    assert {len(q.prompt) for q in questions} == {LENGTH - max(len(q.answer) for q in questions)}


def test_compressions_are_counted_from_the_evidence_to_the_question():
    """Segments that end between the needle's last token and the question's first."""
    haystack = Haystack(torch.zeros(0, dtype=torch.long), torch.arange(3, dtype=torch.int32), [1, 2, 3])
    for room, place, expected in [(30, 0, 3), (30, 8, 3), (30, 9, 2), (30, 30, 0), (8, 0, 1), (7, 0, 0)]:
        prompt = Prompt(haystack, room, [(place, [9, 9])], [5])
        assert Question(prompt, [1], place + 2).compressions(10) == expected


# Shortcuts change nothing


@pytest.mark.parametrize("kind", ["delta", "linear", "llama"])
@pytest.mark.parametrize("count", [1, 2])
def test_answers_from_a_branched_memory_are_those_of_generate(kind, count):
    """Shared haystack, rows of a batch, blocks: each question is answered as if it was the only one."""
    model = model_of(kind)
    haystack, questions = questions_of(Needle(TOKENIZER, haystack=PROSE, num_needles=count))
    answers = Trunk(Reader(model), haystack).ask(questions, batch_size=3)
    for question, tokens in zip(questions, answers):
        assert tokens == generated(model, ids_of(question.prompt), len(question.answer))
    assert len({tuple(tokens) for tokens in answers}) > 2


@pytest.mark.parametrize("kind", ["delta", "linear", "llama"])
def test_a_branch_has_the_logits_of_reading_alone(kind):
    model = model_of(kind)
    haystack, questions = questions_of(Passkey(TOKENIZER), depths=(0.3, 0.8))
    trunk = Trunk(Reader(model), haystack)
    for pair in (questions[:2], questions[2:], questions[:2]):  # at last one that the trunk has passed already
        prompts = [question.prompt for question in pair]
        shared = min(prompt.shared for prompt in prompts)
        cache = trunk.branch(shared, 2)
        logits = trunk.reader.read(prompts, cache, shared, len(prompts[0]))
        assert (logits[0] - logits[1]).abs().max() > 1e-3
        for prompt, row in zip(prompts, logits):
            # Float32; the order of sums differs between one call and several.
            alone = model(ids_of(prompt)[None], logits_to_keep=1).logits[0, -1]
            assert_close(row, alone, rtol=1e-4, atol=1e-4)


def test_the_haystack_before_the_needles_is_read_once():
    """Tokens that go through the model: the trunk to the last needle, and the rest of each prompt."""
    model = model_of()
    reader, seen = Reader(model), []
    logits = reader.logits
    reader.logits = lambda ids, *args, **kwargs: (seen.append(ids.numel()), logits(ids, *args, **kwargs))[1]
    haystack, questions = questions_of(Passkey(TOKENIZER), depths=(0.5, 1), samples=4)
    trunk = Trunk(reader, haystack)
    for cell in (questions[:4], questions[4:]):
        trunk.ask(cell, batch_size=4)
    decoded = sum(len(question.answer) - 1 for question in questions)
    own = sum(len(q.prompt) - q.prompt.shared for q in questions)
    assert sum(seen) == max(q.prompt.shared for q in questions) + own + decoded
    assert max(seen) <= model.config.block_length


@pytest.mark.parametrize("kind", ["delta", "llama"])
def test_a_text_is_read_once_for_all_questions_about_it(kind, babi):
    """In rows with other texts; each question is answered as if it was the only one."""
    model = model_of(kind)
    reader, seen = Reader(model), []
    logits = reader.logits
    reader.logits = lambda ids, *args, **kwargs: (seen.append(ids.numel()), logits(ids, *args, **kwargs))[1]
    haystack = Haystack.of(Needle(TOKENIZER, haystack=PROSE), random.Random(0))
    stories = read_babi(str(babi), 1)[:2]
    rngs = [random.Random(i) for i in range(2)]
    questions = hide_stories(TOKENIZER, haystack, stories, rngs, 900, num_questions=3)
    assert len(questions) == 5  # the first story has two names, the second three
    assert len({question.prompt.text for question in questions}) == 2
    answers = Trunk(reader, haystack).ask(questions, batch_size=2)
    assert sum(seen) < 2 * 900 + sum(len(q.prompt) - 800 + q.decoded_tokens for q in questions)
    for question, tokens in zip(questions, answers):
        assert tokens == generated(model, ids_of(question.prompt), question.decoded_tokens)


def test_other_questions_about_a_story_have_their_last_fact_as_evidence(babi):
    """And the story's own is the first, hidden in the same text as those."""
    haystack = Haystack.of(Needle(TOKENIZER, haystack=PROSE), random.Random(0))
    story = read_babi(str(babi), 1)[1]
    for length in (900, 0):
        own, *others = hide_stories(TOKENIZER, haystack, [story], [random.Random(0)], length, num_questions=9)
        text = TOKENIZER.decode(ids_of(own.prompt))
        assert text.endswith(" Where is Mary? Mary is in the") and own.word == "garden"
        said = {}
        for question in others:
            about = TOKENIZER.decode(ids_of(question.prompt))
            name = about.split()[-4]
            assert about == text.replace("Where is Mary? Mary", f"Where is {name}? {name}")
            before = TOKENIZER.decode(question.prompt[0 : question.evidence_end])
            assert before.endswith(f" {name} went{' back' * (name == 'Daniel')} to the {question.word}.")
            said[name] = question.word
        assert said == {"John": "hallway", "Daniel": "hallway"}


@pytest.mark.parametrize("last_segment", [1, 9, N - 1, N])
def test_without_memory_the_last_segment_is_enough(last_segment):
    """Answers from the tail alone are those of `generate` on the whole prompt with `memory_update="none"`."""
    model = model_of()
    reader = Reader(model)
    size = len(questions_of(Passkey(TOKENIZER))[1][0].answer)
    _, questions = questions_of(Passkey(TOKENIZER), length=40 * N + last_segment + size, depths=(0, 1))
    assert {(len(question.prompt) - 1) % N + 1 for question in questions} == {last_segment}
    with reader.memory_off():
        answers = ask_local(reader, questions, batch_size=3, segment_length=N)
    assert model.config.memory_update == "delta"
    model.config.memory_update = "none"
    for question, tokens in zip(questions, answers):
        assert tokens == generated(model, ids_of(question.prompt), len(question.answer))


def test_the_base_model_sees_its_window_only():
    """The last N tokens, those of the answer and what begins a text included."""
    model, window = model_of("llama"), 64
    _, questions = questions_of(Passkey(TOKENIZER), depths=(1,), samples=3)
    longest = max(len(question.answer) for question in questions)
    answers = ask_local(Reader(model), questions, 2, window, opening=[7])
    for question, tokens in zip(questions, answers):
        tail = ids_of(question.prompt)[-(window - longest - 1) :]
        assert tokens == generated(model, torch.cat([torch.tensor([7]), tail]), len(question.answer))


# Scores cannot be fooled


class Seen:
    """The cache of `Finder`: all tokens."""

    def __init__(self):
        self.ids = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.ids = None if self.ids is None else self.ids.repeat_interleave(repeats, dim=0)


class Finder:
    """Stands in for a model that has learned the passkey task to perfection: it looks the answer up in what it sees.

    Args:
        spoil: makes of the right answer, as text, the one that is given.
    """

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, spoil=lambda answer: answer):
        self.config = tiny_config(segment_length=128, block_segments=2)
        self.question, self.spoil = inner_ids(TOKENIZER, " What is the pass key? The pass key is"), spoil

    def __call__(self, input_ids, logits_to_keep=0, use_cache=False, **kwargs):
        cache = kwargs[CACHE]
        cache.ids = input_ids if cache.ids is None else torch.cat([cache.ids, input_ids], 1)
        logits = torch.zeros(len(input_ids), 1, len(TOKENIZER))
        for row, ids in enumerate(cache.ids.tolist()):
            logits[row, 0, self.next_token(ids)] = 1
        return types.SimpleNamespace(logits=logits)

    def next_token(self, ids: list[int]) -> int:
        size = len(self.question)
        ends = [end for end in range(size, len(ids) + 1) if ids[end - size : end] == self.question]
        found = re.search(r"pass key is (\d+)\. Remember", TOKENIZER.decode(ids))
        if not ends or not found:
            return 0
        answer = inner_ids(TOKENIZER, self.spoil(f" {found[1]}."))
        said = len(ids) - ends[-1]
        return answer[said] if said < len(answer) else 0


def accuracy(model: Finder, depth: float) -> dict[str, float]:
    """Of the model and of the same one without memory."""
    reader = Reader(model, new_cache=Seen)
    haystack, questions = questions_of(Passkey(TOKENIZER), length=600, depths=(depth,), samples=4)
    answers = {"memory": Trunk(reader, haystack).ask(questions, 3)}
    with reader.memory_off():
        answers["off"] = ask_local(reader, questions, 3, model.config.segment_length)
    return {
        system: sum(q.is_right(tokens, TOKENIZER) for q, tokens in zip(questions, given)) / len(questions)
        for system, given in answers.items()
    }


def test_a_model_that_knows_is_always_right_and_only_where_it_sees():
    """Also at the start of the text with memory; without, only if the needle is in the last segment."""
    assert accuracy(Finder(), 0.0) == {"memory": 1.0, "off": 0.0}
    assert accuracy(Finder(), 0.5) == {"memory": 1.0, "off": 0.0}
    assert accuracy(Finder(), 1.0) == {"memory": 1.0, "off": 1.0}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda answer: answer[:-2] + str((int(answer[-2]) + 1) % 10) + ".",  # the last digit
        lambda answer: " " + str(int(answer[1]) % 9 + 1) + answer[2:],  # the first one
        lambda answer: answer[:-1] + "0.",  # one too many
        lambda answer: answer[:-2] + ".",  # one too few
        lambda answer: " " + answer,
        lambda answer: answer[:-1] + "!",
        lambda answer: " 12345." if answer != " 12345." else " 1.",
    ],
)
def test_an_answer_that_is_wrong_anywhere_is_wrong(spoil):
    assert accuracy(Finder(spoil), 0.5) == {"memory": 0.0, "off": 0.0}


def test_another_cut_into_tokens_is_the_same_answer():
    question = Question(None, inner_ids(TOKENIZER, " rained."), 0)
    letters = [TOKENIZER.convert_tokens_to_ids(letter) for letter in "\u0120rained."]
    assert len(letters) > len(question.answer) and question.is_right(letters, TOKENIZER)
    assert question.is_right(question.answer, TOKENIZER) and not question.is_right(letters[:-1], TOKENIZER)


@pytest.mark.parametrize(
    ("said", "right"),
    [(" kitchen.", True), (" Kitchen\n", True), (" kitchenette", False), (" the kitchen", False), ("", False)],
)
def test_the_first_word_answers_a_babi_question(said, right):
    question = Question(None, inner_ids(TOKENIZER, " kitchen"), 0, word="kitchen")
    assert question.is_right(inner_ids(TOKENIZER, said), TOKENIZER) == right


# BABILong


@pytest.fixture
def babi(tmp_path: Path) -> Path:
    """A folder of stories, laid out like bAbI's."""
    folder = tmp_path / "babi"
    folder.mkdir()
    for split in ("test", "train"):
        (folder / f"qa1_single-supporting-fact_{split}.txt").write_text(STORIES)
    return folder


def test_a_babi_question_has_all_facts_above_it(babi):
    first, second, third = read_babi(str(babi), 1)
    assert first == BabiStory(
        ["Mary moved to the bathroom.", "John went to the hallway."], "Where is Mary?", "bathroom", [0]
    )
    assert second.facts[2:] == ["Daniel went back to the hallway.", "Mary moved to the garden."]
    assert second.support == [3] and third.facts == ["John went to the office."]


def test_facts_are_hidden_in_their_order(babi):
    """Evidence ends with the oldest supporting fact, and length 0 is the story alone."""
    haystack = Haystack.of(Needle(TOKENIZER, haystack=PROSE), random.Random(0))
    story = read_babi(str(babi), 1)[1]
    for length in (900, 0):
        (question,) = hide_stories(TOKENIZER, haystack, [story], [random.Random(0)], length)
        text = TOKENIZER.decode(ids_of(question.prompt))
        places = [text.index(f" {fact}") for fact in story.facts]
        assert places == sorted(places) and text.endswith(" Where is Mary? Mary is in the")
        assert len(question.prompt) + question.decoded_tokens == length or length == 0
        before = TOKENIZER.decode(question.prompt[0 : question.evidence_end])
        assert before.endswith(" Mary moved to the garden.") and question.word == "garden"
    assert len(question.prompt) == len(haystack.intro) + sum(
        len(inner_ids(TOKENIZER, f" {part}")) for part in (*story.facts, "Where is Mary? Mary is in the")
    )


@pytest.mark.parametrize(
    ("question", "prompt"),
    [
        ("Where is Mary?", "Where is Mary? Mary is in the"),
        ("Where is the milk?", "Where is the milk? The milk is in the"),
        (
            "Where was the milk before the office?",
            "Where was the milk before the office? Before the office the milk was in the",
        ),
        ("Who is in the office?", "Who is in the office? Answer:"),
    ],
)
def test_an_answer_begins_with_what_is_asked_for(question, prompt):
    assert babi_prompt(question) == prompt


def test_evidence_ends_with_the_oldest_supporting_fact():
    """Whichever is named first: all of them have to be remembered."""
    haystack = Haystack.of(Needle(TOKENIZER, haystack=PROSE), random.Random(0))
    facts = ["Mary took the milk.", "It rained.", "Mary moved to the garden."]
    story = BabiStory(facts, "Where is the milk?", "garden", [2, 0])
    (question,) = hide_stories(TOKENIZER, haystack, [story], [random.Random(0)], 900)
    assert question.evidence_end == question.prompt.spans[0][1]


@pytest.mark.parametrize("continued", [True, False])
def test_a_trained_babi_sample_is_an_evaluated_question_and_its_answer(babi, continued):
    """Facts in their order between sentences, anywhere; of a length that is exact; the oldest fact needed is its needle."""
    task, seen = Babilong(TOKENIZER, babi=str(babi), haystack=PROSE), set()
    for seed in range(30):
        sample = task.sample(random.Random(seed), 400, continued=continued)
        text, answer = TOKENIZER.decode(sample.ids), TOKENIZER.decode(sample.ids[sample.answer])
        asked = next(s for s in read_babi(str(babi), 1, "train") if f"{babi_prompt(s.question)} {s.answer}." in text)
        assert answer == f" {asked.answer}." and len(sample.ids) == 400
        places = [text.rindex(f" {fact}") for fact in asked.facts]
        assert places == sorted(places) and text.startswith("There are facts") != continued
        assert TOKENIZER.decode(sample.ids[sample.needle]) == f" {asked.facts[min(asked.support)]}"
        seen.add((asked.question, asked.answer, sample.needle.start))
    assert len(seen) > 20
    with pytest.raises(ValueError, match="length 100 is too short for a story, by"):
        task.sample(random.Random(0), 100)
    with pytest.raises(ValueError, match="babi is missing"):
        Babilong(TOKENIZER, haystack=PROSE)
    with pytest.raises(ValueError, match="haystack is missing"):
        Babilong(TOKENIZER, babi=str(babi))


def test_a_trained_babi_sample_asks_where_the_others_are_too(babi):
    """Each one once, where the last fact about them says; the story's own question comes last."""
    task, asked = Babilong(TOKENIZER, babi=str(babi), num_questions=3, haystack=PROSE), set()
    for seed in range(30):
        sample = task.sample(random.Random(seed), 500)
        answers = [TOKENIZER.decode(sample.ids[answer]) for answer in (*sample.earlier, sample.answer)]
        turns = re.findall(r"Where is (\w+)\? \1 is in the( \w+\.)", TOKENIZER.decode(sample.ids))
        assert [answer for _, answer in turns] == answers and len(sample.ids) == 500 == sample.answer.stop
        asked.add(tuple((name, answer.strip(" .")) for name, answer in turns))
    mary, john, daniel = ("Mary", "garden"), ("John", "hallway"), ("Daniel", "hallway")
    assert asked == {
        (("John", "hallway"), ("Mary", "bathroom")),
        (john, daniel, mary),
        (daniel, john, mary),
        (("John", "office"),),
    }
    for options, problem in (
        ({"num_questions": 0}, "is 0: give 1"),
        ({"num_questions": 2, "babi_task": 2}, "babi_task 1"),
        ({"asked_between": 1.0}, "asked_between is 1.0: give 0, or"),
        ({"asked_between": 0.5, "babi_task": 2}, "babi_task 1"),
    ):
        with pytest.raises(ValueError, match=problem):
            Babilong(TOKENIZER, babi=str(babi), haystack=PROSE, **options)


def test_a_trained_babi_sample_asks_between_the_facts(babi):
    """What is right there, and as often as there is room; with an answer for each question."""
    counts = []
    for asked_between, length in ((0.0, 900), (0.8, 900), (0.8, 320)):
        task, count = Babilong(TOKENIZER, babi=str(babi), asked_between=asked_between, haystack=PROSE), 0
        for seed in range(30):
            sample = task.sample(random.Random(seed), length)
            answers = [TOKENIZER.decode(sample.ids[answer]) for answer in (*sample.earlier, sample.answer)]
            said = TOKENIZER.decode(sample.ids)
            found = re.findall(
                r"(\w+) (?:moved|went back|went) to the (\w+)\.|Where is (\w+)\? \3 is in the( \w+\.)", said
            )
            places, seen = {}, []
            for mover, place, sought, answer in found:
                if mover:
                    places[mover] = place
                else:
                    assert answer == f" {places[sought]}."
                    seen.append(answer)
            assert seen == answers and len(sample.ids) == length
            count += len(answers)
        counts.append(count)
    without, often, little_room = counts
    assert without == 30 < little_room < often


def test_stories_that_are_none_are_refused(babi, tmp_path):
    with pytest.raises(ValueError, match="qa2_"):
        read_babi(str(babi), 2)
    (babi / "qa1_single-supporting-fact_test.txt").write_text("1 Mary left.\nand so on\n")
    with pytest.raises(ValueError, match="line 2 of "):
        read_babi(str(babi), 1)


# Summaries


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("kind", ["delta", "linear", "llama"])
@pytest.mark.parametrize("segment_length", [N, 256])
def test_a_summary_is_what_generate_says(kind, chat, segment_length):
    """With memory and without, whether there is room for it in the instruction's segment or not."""
    model, size = model_of(kind), 20
    if kind != "llama":
        model.config.segment_length = segment_length
    reader, prompt = Reader(model), summary_prompt(TOKENIZER, PROSE, segment_length, size, chat=chat)
    assert go_on(reader, prompt, size, set()) == generated(model, ids_of(prompt), size)
    if kind != "llama":
        with reader.memory_off():
            said = go_on(reader, prompt, size, set(), start=(len(prompt) - 1) // segment_length * segment_length)
        model.config.memory_update = "none"
        assert said == generated(model, ids_of(prompt), size)


def test_a_summary_ends_where_the_model_ends_it():
    """Before the token that ends a text, and nothing is decoded after it."""
    reader, prompt = Reader(model_of()), summary_prompt(TOKENIZER, PROSE, N, 20)
    whole = go_on(reader, prompt, 20, set())
    index = next(i for i in range(3, 20) if whole[i] not in whole[:i])
    assert go_on(reader, prompt, 20, {whole[index], 1}) == whole[:index]
    assert go_on(reader, prompt, 20, {whole[0]}) == []


@pytest.mark.parametrize("chat", [True, False])
def test_the_instruction_follows_the_book(chat):
    """In the words and tokens of generate.py: as one turn of the user, or plainly; blank ends of the file are its own."""
    prompt = summary_prompt(TOKENIZER, PROSE.strip(), 4096, 100, chat=chat)
    text = TOKENIZER.decode(ids_of(prompt))
    assert text.startswith("<|user|>It was a dark" if chat else "It was a dark") and PROSE.strip() in text
    end = "and to whom.<|end|><|assistant|>" if chat else "and to whom.\n\nSummary:"
    assert text.endswith(end) and text.count("\n\nSummarize the book above") == 1
    if chat:
        turn = [{"role": "user", "content": text.removeprefix("<|user|>").removesuffix("<|end|><|assistant|>")}]
        assert text == TOKENIZER.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def test_instruction_and_summary_are_in_one_segment():
    """For every length of the book, of which no more is left out than that takes, and never what would fit."""
    segment_length, size = 256, 100
    cut = set()
    for limit in range(200, 200 + segment_length):
        prompt = summary_prompt(TOKENIZER, PROSE, segment_length, size, limit=limit)
        needed = len(prompt) - prompt.question + size
        assert prompt.question // segment_length == (prompt.question + needed - 1) // segment_length
        left_out = limit - (prompt.question - len(prompt.haystack.intro))
        assert left_out == 0 or (prompt.question + needed) % segment_length == 0
        cut.add(left_out)
    assert cut == set(range(needed))


def test_the_window_has_the_end_of_the_book():
    """And its opening and the instruction, all of them within so many tokens."""
    whole = summary_prompt(TOKENIZER, PROSE, 4096, 100, chat=True)
    window, opening = window_prompt(whole, 200), len(whole.haystack.intro)
    ids, expected = ids_of(window).tolist(), ids_of(whole).tolist()
    assert len(ids) == 200 and opening > 0
    assert ids == expected[:opening] + expected[opening - 200 :]
    assert ids_of(window_prompt(whole, 4096)).tolist() == expected
    assert ids_of(window_prompt(whole, 1)).tolist() == expected[:opening] + expected[whole.question :]


def test_rouge_is_counted_in_words_pairs_and_order():
    """F1 by hand; endings of words do not matter, case and punctuation neither."""
    scores = rouge("The cat sat.", "the cat ran home")
    assert scores == pytest.approx({"rouge1": 4 / 7, "rouge2": 2 / 5, "rougeL": 4 / 7})
    assert rouge("home ran the cat", "the cat ran home") == pytest.approx(
        {"rouge1": 1, "rouge2": 1 / 3, "rougeL": 0.5}
    )
    assert set(rouge("Dogs were running!", "dog were runs").values()) == {1.0}
    assert set(rouge("", "the cat").values()) == {0.0}


# Whole texts


def test_tokens_come_in_equal_chunks():
    pieces = [PROSE[:100], PROSE[100:]]
    whole = sum((TOKENIZER(piece)["input_ids"] for piece in pieces), [])
    chunks = list(take_tokens(TOKENIZER, pieces, 7))
    assert torch.cat(chunks).tolist() == whole and {len(chunk) for chunk in chunks[:-1]} == {7}
    assert torch.cat(list(take_tokens(TOKENIZER, pieces, 7, limit=24))).tolist() == whole[:24]


@pytest.mark.parametrize("tokens", [150, 161, 2 * N * 4 + 1])
def test_losses_are_those_of_one_pass(tokens):
    """With memory and without, on the whole text; of the base model, of each segment by itself; in every bucket."""
    model, base = model_of(), model_of("llama")
    ids = torch.randint(1, len(TOKENIZER), (tokens,))
    systems = {"memory": Reader(model), "off": Reader(model), "window": Reader(base)}
    result = losses_by_segments(systems, ids.split(N * 4), N)

    expected = {"memory": model(ids[None]).logits[0]}
    model.config.memory_update = "none"
    expected["off"] = model(ids[None]).logits[0]
    expected["window"] = torch.cat([base(segment[None]).logits[0] for segment in ids.split(N)])
    for system, logits in expected.items():
        losses = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
        names = [bucket_label(bucket(p // N)) for p in range(tokens - 1)]
        assert list(result[system]) == list(dict.fromkeys(names))
        for name, (loss, count) in result[system].items():
            chosen = [i for i, other in enumerate(names) if other == name]
            assert count == len(chosen)
            # Float32 losses of about 6, summed in another order.
            assert loss == pytest.approx(losses[chosen].sum().item(), rel=1e-4)
    assert result["memory"] != result["off"]


def test_buckets_double():
    assert [bucket_label(bucket(n)) for n in (0, 1, 2, 3, 4, 7, 8)] == ["0", "1", "2-3", "2-3", "4-7", "4-7", "8-15"]


def test_the_effective_rank_counts_directions():
    assert effective_rank(torch.eye(8)).item() == pytest.approx(8)
    assert effective_rank(torch.ones(8, 8)).item() == pytest.approx(1, rel=1e-3)
    assert effective_rank(torch.zeros(8, 8)).item() == 0
    assert effective_rank(torch.stack([torch.eye(8), torch.diag(torch.arange(8.0))])).shape == (2,)


def test_memory_is_looked_at_after_powers_of_two():
    """What is found then is what one pass over that many segments leaves."""
    model = model_of()
    ids = torch.randint(1, len(TOKENIZER), (N * 11 + 3,))
    growth = memory_growth(Reader(model), ids.split(N))
    assert list(growth) == ["1", "2", "4", "8", "11"]
    for segments, numbers in growth.items():
        cache = InfiniCache(model.config)
        with torch.no_grad():
            model(ids[None, : N * int(segments)], past_key_values=cache)
        norms = [memory.normalizer.norm(dim=-1).mean().item() for memory in cache]
        assert numbers["normalizer_norm"] == pytest.approx(norms, rel=1e-4)
        ranks = [effective_rank(memory.matrix).mean().item() for memory in cache]
        assert numbers["effective_rank"] == pytest.approx(ranks, rel=1e-2)


# The command


def save(model: torch.nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> types.SimpleNamespace:
    """A saved InfiniLlama and its base."""
    root = tmp_path_factory.mktemp("models")
    return types.SimpleNamespace(ours=save(model_of(), root / "ours"), base=save(model_of("llama"), root / "base"))


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(PROSE, encoding="utf-8")
    return path


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """Two of them, with summaries, and a blank line."""
    rows = [{"text": PROSE[n:], "summary": f"Nobody came on {n} dark nights.", "title": "?"} for n in (0, 200)]
    path = tmp_path / "books.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def run(folders, tmp_path, capsys):
    """Run evaluate.py in this process on the tiny model, and return its report."""

    def run(*options, model: Path = folders.ours, code: int = 0, output: str = "results"):
        capsys.readouterr()
        arguments = [str(model), "--device", "cpu", "--output", str(tmp_path / output), *map(str, options)]
        assert evaluate.main(arguments) == code
        captured = capsys.readouterr()
        if code:
            assert captured.out == "" and captured.err.splitlines()[-1].startswith("error: ")
            return captured.err.splitlines()[-1]
        return json.loads(captured.out.splitlines()[-1])

    return run


PASSKEY = ("--tasks", "passkey", "--lengths", "400", "--samples", "2")


def results(tmp_path: Path, output: str = "results") -> dict:
    return json.loads((tmp_path / output / "results.json").read_text(encoding="utf-8"))


def without_seconds(content: dict) -> dict:
    return {key: {k: v for k, v in cell.items() if k != "seconds"} for key, cell in content["cells"].items()}


def test_samples_are_divided_among_stretches_of_prose(run, book, monkeypatch):
    """Evenly; the first stretch is that of a single one. Sentences that repeat are the same everywhere."""
    hidden, hide = [], evaluate.hide
    monkeypatch.setattr(
        evaluate,
        "hide",
        lambda task, haystack, rngs, *a: hidden.append((haystack.offset, len(rngs))) or hide(task, haystack, rngs, *a),
    )
    for number, options in enumerate((("needle", "--stretches", "2"), ("needle", "--stretches", "1"), ("passkey",))):
        options += ("--haystack", book, "--lengths", "700", "--samples", "5", "--depths", "0")
        run("--tasks", *options, output=f"results-{number}")
    (first, three), (second, two), (single, five), passkeys = hidden
    assert first == single != second and (three, two, five) == (3, 2, 5) and passkeys == (0, 5)


def test_every_task_is_measured_and_written(run, folders, book, babi, books, tmp_path):
    """With both controls; numbers come with what they were measured with."""
    options = ["--tasks", *evaluate.TASKS, "--lengths", "0", "700", "--samples", "2", "--depths", "0", "1"]
    options += [
        "--haystack",
        book,
        "--needles",
        "words",
        "--num-needles",
        "1",
        "2",
        "--babi",
        babi,
        "--babi-tasks",
        "1",
        "--num-questions",
        "3",
    ]
    options += ["--books", books, "--summary-tokens", "5"]
    report = run(*options, "--shots", "1", "--texts", book, "--max-tokens", "200", "--base", folders.base)
    content = results(tmp_path)
    cells = {f"{name}/700/{depth}" for name in ("passkey", "needle/words-1", "needle/words-2") for depth in (0, 1)}
    cells |= {"babilong/qa1/0", "babilong/qa1/700", f"perplexity/{book}", "gates", "memory"}
    cells |= {"summarise/1", "summarise/2"}
    assert set(content["cells"]) == set(report["cells"]) == cells
    cell = content["cells"]["passkey/700/0"]
    assert set(cell["accuracy"]) == {"memory", "off", "window"} and len(cell["samples"]) == 2
    assert cell["samples"][0]["compressions"] > 10 and re.fullmatch(r" \d{5}\.", cell["samples"][0]["answer"])
    losses = content["cells"][f"perplexity/{book}"]["losses"]
    assert set(losses) == {"memory", "off", "window"}
    # Converted, so that one segment is the base model's; float32 sums of 16 losses.
    assert losses["memory"]["0"][0] == pytest.approx(losses["window"]["0"][0], rel=1e-5)
    cell = content["cells"]["summarise/2"]
    assert set(cell["rouge"]) == {"memory", "off", "window"} and "summaries" not in report["cells"]["summarise/2"]
    assert cell["summaries"]["reference"] == "Nobody came on 200 dark nights."
    assert cell["rouge"]["off"] == rouge(cell["summaries"]["off"], cell["summaries"]["reference"])
    assert all(0 < tokens <= 5 for tokens in cell["summary_tokens"].values())
    model = InfiniLlamaForCausalLM.from_pretrained(folders.ours)
    gate = torch.sigmoid(model.model.layers[1].self_attn.memory_gate.bias[2]).item()
    assert content["cells"]["gates"]["gates"][1][2] == pytest.approx(gate)
    (about,) = content["runs"]
    assert about["seed"] == 0 and about["command"][:2] == ["evaluate.py", str(folders.ours)]
    assert {"torch", "transformers"} <= set(about["versions"]) and "cores" in about["machine"] and "commit" in about
    markdown = (tmp_path / "results" / "results.md").read_text(encoding="utf-8")
    for task in evaluate.TASKS:
        assert f"## {task}\n" in markdown
    assert sorted(path.name for path in (tmp_path / "results").glob("*.tmp")) == []


def test_a_plain_llama_is_measured_on_the_same_tasks(run, folders, book):
    """With full attention, as long as it fits; it has no memory to switch off."""
    tasks = ["--tasks", "passkey", "perplexity", "--lengths", "400", "--samples", "1", "--texts", book]
    report = run(*tasks, model=folders.base)["cells"]
    assert set(report["passkey/400/0"]["accuracy"]) == {"model"}
    assert set(report[f"perplexity/{book}"]["losses"]) == {"model"}
    assert "is no InfiniLlama" in run("--tasks", "gates", model=folders.base, output="other", code=2)


def test_layers_are_compiled_on_request(run, folders, monkeypatch):
    """Those of the base model too. Results are of the same settings, and are gone on with."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer: compiled.append(layer))
    options = ("--tasks", "passkey", "--lengths", "600", "--samples", "1", "--base", str(folders.base))
    for added, expected in (((), 0), (("--compile", "--depths", "0.25"), 4)):
        report = run(*options, *added)
        assert len(compiled) == expected
    assert len(report["cells"]) == 4


def test_a_killed_run_goes_on(run, tmp_path, monkeypatch):
    """What is finished is kept and not measured again; in the end all is as if the run had not been killed."""
    whole = run(*PASSKEY, output="whole")
    ask, calls = Trunk.ask, []

    def killed_at_third(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return ask(self, *args)

    monkeypatch.setattr(Trunk, "ask", killed_at_third)
    with pytest.raises(KeyboardInterrupt):
        run(*PASSKEY)
    assert set(results(tmp_path)["cells"]) == {"passkey/400/0", "passkey/400/0.5"}
    assert set(run(*PASSKEY)["cells"]) == set(whole["cells"]) and len(calls) == 4
    assert without_seconds(results(tmp_path)) == without_seconds(results(tmp_path, "whole"))
    assert len(results(tmp_path)["runs"]) == 2


def test_summaries_go_on_at_the_next_book(run, books, tmp_path, monkeypatch):
    """As if the run had not been killed; with other settings they are not mixed."""
    options = ["--tasks", "summarise", "--books", books, "--summary-tokens", "6", "--segment-length", "512"]
    whole = run(*options, output="whole")
    assert {system for cell in whole["cells"].values() for system in cell["rouge"]} == {"memory", "off"}
    go_on, calls = evaluate.go_on, []

    def killed_at_third(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return go_on(*args)

    monkeypatch.setattr(evaluate, "go_on", killed_at_third)
    with pytest.raises(KeyboardInterrupt):
        run(*options)
    assert set(results(tmp_path)["cells"]) == {"summarise/1"}
    run(*options)
    assert len(calls) == 5 and without_seconds(results(tmp_path)) == without_seconds(results(tmp_path, "whole"))
    assert "chat is False" in run(*options, "--no-chat", code=2)
    assert "summary_tokens is 7" in run(*options, "--summary-tokens", "7", code=2)


def test_more_can_be_added_to_results(run, tmp_path):
    """Depths, lengths and tasks; the file and its tables have all of them."""
    run(*PASSKEY, "--depths", "0")
    report = run("--tasks", "passkey", "gates", "--lengths", "500", "--samples", "2", "--depths", "1")
    assert set(report["cells"]) == {"passkey/400/0", "passkey/500/1", "gates"}
    assert "| 400 | memory |" in (tmp_path / "results" / "results.md").read_text()


def test_results_of_other_settings_are_not_mixed(run, folders, tmp_path):
    """Another seed, rule, number of samples, model; also other weights in the same folder."""
    model = tmp_path / "model"
    save(model_of(), model)
    run(*PASSKEY, model=model)
    before = (tmp_path / "results" / "results.json").read_bytes()
    assert "seed is 1" in run(*PASSKEY, "--seed", "1", model=model, code=2)
    assert "memory_update is 'linear'" in run(*PASSKEY, "--memory-update", "linear", model=model, code=2)
    assert "samples is 3" in run("--tasks", "passkey", "--samples", "3", model=model, code=2)
    assert "of '" in run(*PASSKEY, model=folders.ours, code=2)
    trained = model_of()
    with torch.no_grad():
        trained.model.layers[0].self_attn.memory_gate.bias += 1
    trained.save_pretrained(model)
    assert "weights is" in run(*PASSKEY, model=model, code=2)
    assert (tmp_path / "results" / "results.json").read_bytes() == before


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_an_adapter_is_merged(run, folders, tmp_path):
    """Its gates are those of the table."""
    model = get_peft_model(model_of(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["memory_gate"]))
    with torch.no_grad():
        for layer in model.get_base_model().model.layers:
            layer.self_attn.memory_gate.modules_to_save["default"].bias.fill_(2.0)
    model.save_pretrained(tmp_path / "adapter")
    report = run("--tasks", "gates", "--adapter", tmp_path / "adapter")
    gate = torch.sigmoid(torch.tensor(2.0)).item()
    assert all(row == pytest.approx([gate] * 4) for row in report["cells"]["gates"]["gates"])
    assert "cannot be loaded" in run("--tasks", "gates", "--adapter", tmp_path, output="other", code=2)
    gated = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["memory_gate", "write_gate"])
    get_peft_model(tiny_model(vocab_size=len(TOKENIZER), write_gate=True), gated).save_pretrained(tmp_path / "gated")
    assert "--write-gate" in run("--tasks", "gates", "--adapter", tmp_path / "gated", output="other", code=2)


def test_accuracy_is_counted_by_compressions():
    samples = [{"compressions": n, "right": {"memory": n < 3, "off": False}} for n in (0, 2, 3, 3, 5)]
    counts = evaluation_report.by_compressions([{"samples": samples[:2]}, {"samples": samples[2:]}])
    assert list(counts) == ["0", "2-3", "4-7"]
    assert counts["2-3"] == {"memory": (1, 3), "off": (0, 3)}


def test_the_paper_stands_beside_its_lengths():
    assert evaluation_report.paper("131072")[-1] == "100/100/99"
    assert evaluation_report.paper("1000000")[-2:] == ["96/94/100", "100/100/100"]
    assert set(evaluation_report.paper("4096")) == {""}


def test_summaries_stand_beside_the_papers():
    """Means over books, and the geometric mean of the three, which is the paper's overall."""
    cells = [{"tokens": 9, "rouge": {"off": {"rouge1": x, "rouge2": 0.08, "rougeL": 0.2}}} for x in (0.3, 0.5)]
    text, table = evaluation_report.summaries_table("summarise", {("1",): cells[0], ("2",): cells[1]})
    lines = table.splitlines()
    assert "| all | off |  | 40.0 | 8.0 | 20.0 | 18.6 |" in lines and "of 2 summaries" in text
    assert "| the paper's | linear |  | 37.9 | 8.7 | 17.6 | 18.0 |" in lines
    assert "| the paper's | delta |  | 40.0 | 8.8 | 17.9 | 18.5 |" in lines
    assert "| 2 | off | 9 | 50.0 | 8.0 | 20.0 | 20.0 |" in lines


def test_without_matplotlib_there_are_tables(run, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation_report, "has_matplotlib", lambda: False)
    assert run("--tasks", "gates")["plots"] == []
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["results.json", "results.md"]


def test_plots_are_drawn(run, folders, book, babi, books, tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib, which is optional")
    options = ["--lengths", "700", "--samples", "1", "--babi", babi, "--babi-tasks", "1", "--haystack", book]
    options += ["--books", books, "--summary-tokens", "2"]
    report = run("--tasks", *evaluate.TASKS, *options, "--texts", book, "--max-tokens", "100", "--shots", "0")
    assert report["plots"] == [f"{task}.png" for task in evaluate.TASKS]
    assert all((tmp_path / "results" / name).stat().st_size > 5000 for name in report["plots"])


def test_bad_input_is_refused_before_a_model_is_loaded(run, book, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load", lambda *args, **kwargs: pytest.fail("this is expensive"))
    assert "--babi" in run("--tasks", "babilong", code=2)
    assert "--texts" in run("--tasks", "perplexity", code=2)
    assert "--texts" in run("--tasks", "memory", code=2)
    assert "--haystack" in run("--tasks", "babilong", "--babi", tmp_path, code=2)
    assert "does not exist" in run("--tasks", "needle", "--haystack", tmp_path / "no.txt", code=2)
    assert "qa1_" in run("--tasks", "babilong", "--babi", tmp_path, "--haystack", book, code=2)
    options = ("--babi", tmp_path, "--haystack", book, "--num-questions", "3")
    assert "--babi-tasks 1" in run("--tasks", "babilong", *options, code=2)
    book.write_bytes(b"caf\xe9")
    assert "UTF-8" in run("--tasks", "perplexity", "--texts", book, code=2)


@pytest.mark.parametrize(
    "line", ["{", "[]", "7", '{"text": "a"}', '{"text": "a", "summary": 1}', '{"text": " ", "summary": "a"}', b"\xff"]
)
def test_books_that_are_none_are_refused_with_their_line(run, books, line, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load", lambda *args, **kwargs: pytest.fail("this is expensive"))
    books.write_bytes(books.read_bytes() + (line if isinstance(line, bytes) else line.encode()))
    assert "line 4 of --books" in run("--tasks", "summarise", "--books", books, code=2)


def test_what_summaries_need_is_said_before_a_model_is_loaded(run, books, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load", lambda *args, **kwargs: pytest.fail("this is expensive"))
    assert "needs --books" in run("--tasks", "summarise", code=2)
    assert "cannot be read" in run("--tasks", "summarise", "--books", tmp_path, code=2)
    (tmp_path / "empty").write_text("\n")
    assert "is empty" in run("--tasks", "summarise", "--books", tmp_path / "empty", code=2)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "rouge_score" else find_spec(n, *a))
    assert "infini-llama[evaluate]" in run("--tasks", "summarise", "--books", books, code=2)


def test_what_only_the_model_shows_is_refused_too(run, folders, book, tmp_path):
    assert "cannot be loaded" in run(*PASSKEY, model=tmp_path / "nothing", code=2)
    assert "too short" in run("--tasks", "passkey", "--lengths", "30", code=2)
    assert "memory_update is none" in run("--tasks", "memory", "--texts", book, "--memory-update", "none", code=2)
    other = copy.deepcopy(TOKENIZER)
    other.add_tokens(["another"])
    base = save(model_of("llama"), tmp_path / "base")
    other.save_pretrained(base)
    assert "another tokenizer" in run(*PASSKEY, "--base", base, code=2)
    (tmp_path / "results").mkdir(exist_ok=True)
    for content in ("{", "[]", '{"format": "?"}'):
        (tmp_path / "results" / "results.json").write_text(content)
        assert "--output" in run(*PASSKEY, code=2)


@pytest.mark.parametrize("option", [["--depths", "2"], ["--lengths", "-1"], ["--samples", "0"], ["--tasks", "chess"]])
def test_options_out_of_range_are_refused(folders, option, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate.main([str(folders.ours), "--output", "never", "--tasks", "passkey", *option])
    assert option[0] in capsys.readouterr().err


def test_it_runs_as_a_file_and_says_how_to_use_it(tmp_path):
    """From any folder; the examples of the docstring are part of the help."""
    program = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), "--help"]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "python scripts/evaluate.py" in done.stdout


# lm-evaluation-harness


HARNESS_TASKS = ROOT / "scripts" / "lm_eval_tasks"


class HarnessLoader(yaml.SafeLoader):
    """Reads `!function module.name` as its name."""


HarnessLoader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def harness_samples(folder: Path, name: str, **metadata) -> tuple[dict, list[dict]]:
    """A task file, and the samples that its function makes, called as the harness does."""
    task = yaml.load((HARNESS_TASKS / f"{name}.yaml").read_text(encoding="utf-8"), Loader=HarnessLoader)
    module, _, function = task["custom_dataset"].partition(".")
    spec = importlib.util.spec_from_file_location(module, HARNESS_TASKS / f"{module}.py")
    samples = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(samples)
    made = getattr(samples, function)(**task["metadata"], pretrained=str(folder), **metadata)
    return task, list(made[task["test_split"]])


@pytest.mark.parametrize("name", ["infini_passkey", "infini_needle"])
def test_the_harness_asks_what_evaluate_asks(folders, book, name):
    """Prompts of the asked lengths, with the answer in them at the asked depth and the question at their end."""
    options = {} if name == "infini_passkey" else {"haystack": str(book), "values": "words", "num_needles": 2}
    task, samples = harness_samples(folders.ours, name, lengths=[500, 900], samples=3, **options)
    assert task["task"] == name and len(samples) == 2 * 3 * 3
    for sample in samples:
        prompt, answer = sample["prompt"], sample["answer"]
        where = prompt.index(f" is {answer}." if name == "infini_passkey" else f" is: {answer}.") / len(prompt)
        # Introduction, question and the needles themselves take a part of so short a text.
        assert abs(where - sample["depth"]) < 0.5 and not answer.endswith(".") and answer == answer.strip()
        assert prompt.endswith(" is") and prompt.startswith(("There is", "Some special"))
        assert re.fullmatch(r"\d{5}" if name == "infini_passkey" else r"\w+-\w+", answer)
        # The answer is left out, and parts that were tokenised apart may be fewer tokens together.
        assert sample["length"] - 60 < len(TOKENIZER(prompt)["input_ids"]) < sample["length"]
        # As the harness decides: up to the stop, without the blank before it.
        said = f" {answer}. And so on".split(task["generation_kwargs"]["until"][0])[0]
        assert re.sub(task["metric_list"][0]["regexes_to_ignore"][0], "", said) == answer
        assert len(TOKENIZER(answer)["input_ids"]) < task["generation_kwargs"]["max_gen_toks"]
    assert samples == harness_samples(folders.ours, name, lengths=[500, 900], samples=3, **options)[1]
    assert samples != harness_samples(folders.ours, name, lengths=[500, 900], samples=3, seed=1, **options)[1]


def test_the_harness_runs_the_tasks(tmp_path):
    """`lm-eval run`, as samples.py says it."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is no dependency of this project")
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.eos_token = "<|end|>"  # the harness wants one
    model = save(model_of(), tmp_path / "model")
    tokenizer.save_pretrained(model)
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--include_path"]
    command += [HARNESS_TASKS, "--tasks", "infini_passkey,infini_needle", "--output_path", tmp_path / "out"]
    command += ["--model_args", f"pretrained={model},trust_remote_code=True,max_length=5000"]
    command += ["--metadata", '{"lengths": [1500], "samples": 1}']
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").rglob("*.json")
    found = json.loads(path.read_text(encoding="utf-8"))["results"]
    assert all(found[task]["exact_match,none"] == 0 for task in ("infini_passkey", "infini_needle"))
