"""Retrieval tasks made on the fly: something is hidden in a long text, and asked for at its end.

    task = TASKS["passkey"](tokenizer, segment_length=64)
    sample = task.sample(random.Random(0), length=4096)
    tokenizer.decode(sample.ids[sample.answer])  # " 51934."

| task | hidden | text | after |
| --- | --- | --- | --- |
| `passkey` | a number of five digits | five short sentences, repeated | Infini-attention, arXiv 2404.07143, appendix B |
| `needle` | numbers, words or uuids under keys, one or more of them asked | prose, or as for passkey | RULER's NIAH tasks, arXiv 2404.06654 |
| `babilong` | the facts of a bAbI story | prose | BABILong, arXiv 2406.10149 |
| `copy` | random tokens | one token, repeated | for tiny models, which need no tokenizer |

A sample is intro, haystack, question and answer, with the needles somewhere in the haystack. Each part is tokenised by
itself, as it is after a full stop, and parts are joined as tokens: the haystack once, so that a sample of 100,000
tokens takes milliseconds. Needles stand between two sentences of the haystack, if it has any.
"""

import bisect
import itertools
import random
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

__all__ = [
    "TASKS",
    "BabiStory",
    "Babilong",
    "Copy",
    "Needle",
    "Passkey",
    "babi_prompt",
    "RetrievalTask",
    "Sample",
    "opening_ids",
    "other_questions",
    "read_babi",
]

INTRO = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
    "about the important information there."
)
FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
BABI_INTRO = (
    "There are facts about people and things hidden in the following text. Memorize them. I will ask a question about "
    "them, which has an answer of one word."
)
VALUES = ("numbers", "words", "uuids")
# How tokenizers mark a token that begins a word.
WORD_STARTS = ("\u0120", "\u2581")
ADJECTIVES = (
    "amber ancient bitter brave bright broken calm clever cold curious dark distant dusty eager early empty faint "
    "fierce gentle golden hidden hollow humble icy idle jolly lazy little lonely loud lucky mellow narrow noisy pale "
    "patient plain proud quiet rapid rough rusty silent silver simple slow stormy wild"
).split()
NOUNS = (
    "anchor apple arrow basket beacon bell bridge candle canyon castle cloud compass copper desert drum eagle engine "
    "falcon feather forest garden glacier hammer harbor island jacket kettle ladder lantern lemon marble meadow mirror "
    "needle orchard paper pepper pigeon river saddle shadow spoon statue thunder ticket tunnel violin window"
).split()


@dataclass(frozen=True)
class Sample:
    """A sequence of a task: its tokens, and where answer and (asked) needle are in them.

    Attributes:
        needle: is empty where the needle is absent.
        earlier: the answers to other questions, which come before this one.
    """

    ids: list[int]
    answer: slice
    needle: slice
    earlier: tuple[slice, ...] = ()


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that the tokenizer puts before a text: its beginning-of-text token, if it adds one."""
    begin = [tokenizer.bos_token_id]
    return begin if tokenizer("")["input_ids"][:1] == begin else []


def append_turns(ids: list[int], turns: list[list[int]]) -> list[slice]:
    """Append questions and answers, which take turns; return where the answers are."""
    ends = list(itertools.accumulate(map(len, turns), initial=len(ids)))
    ids += itertools.chain(*turns)
    return [slice(start, end) for start, end in zip(ends[1::2], ends[2::2], strict=True)]


class RetrievalTask:
    """What the tasks share: the layout of a sample. A task sets `intro`, `haystack` and `cuts`, and has a `draw`.

    Args:
        segment_length: of the model, or None if samples need not care.
        outside_last_segment: probability that the needle of a sample whose depth is drawn ends before the segment
            in which the question begins, so that only memory can answer. The others end in that segment: a model that
            never sees one there does not learn to look there. It has no effect without `segment_length`, and for
            samples that are too short for it; there the needle is anywhere.
        across_segments: probability that such a needle is one which a segment's end cuts in two, if there is a place
            for it: few are by chance, and a memory has to be shown how to put them together.
        absent: probability that the needle is left out of a sample, which asks for it all the same. There is nothing to
            learn then but that no answer is likelier than another, so that a model has no favourite that wins where
            what it reads from its memory has become weak.
    """

    def __init__(
        self,
        *,
        segment_length: int | None = None,
        outside_last_segment: float = 0.85,
        across_segments: float = 0.0,
        absent: float = 0.0,
    ):
        shares = {"outside_last_segment": outside_last_segment, "across_segments": across_segments, "absent": absent}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is {share}: give a probability, from 0 to 1")
        self.segment_length = segment_length
        self.outside_last_segment, self.across_segments, self.absent = shares.values()
        self.intro: list[int] = []
        self.haystack: list[int] = []
        # Ascending places in the haystack at which a needle may be put.
        self.cuts: list[int] = []

    def draw(self, rng: random.Random) -> tuple[list[list[int]], list[list[int]]]:
        """Return tokens: the needles, of which the first is asked for, and questions and answers by turns, its own last."""
        raise NotImplementedError

    def sample(
        self, rng: random.Random, length: int, *, depth: float | None = None, continued: bool = False
    ) -> Sample:
        """Draw a sample.

        Args:
            rng: the same state gives the same sample.
            length: tokens of the sample, all of them: intro, haystack, needles, question and answer.
            depth: where the needle starts, from 0 for the start of the haystack to 1 for its end, to the next end of a
                sentence; None draws it, see `outside_last_segment`.
            continued: leave out the intro, for a sequence that goes on with a text.
        """
        if depth is not None and not 0 <= depth <= 1:
            raise ValueError(f"depth is {depth}: give a number from 0 (start) to 1 (end), or None to draw it")
        (asked, *others), turns = self.draw(rng)
        # Where nothing may be absent or cut in two, nothing is drawn for it, so that a seed goes on giving the same samples.
        if self.absent and rng.random() < self.absent:
            asked = []
        intro, asking = [] if continued else self.intro, sum(map(len, turns))
        needed = len(intro) + len(asked) + sum(map(len, others)) + asking
        if length < needed:
            raise ValueError(
                f"length {length} is too short for {type(self).__name__}, whose intro, needles, question and answer "
                f"take {needed} tokens: give at least that many"
            )
        offset = self.first_token(rng)
        room = length - needed
        cuts = self.cuts_of_window(offset, room)
        others = sorted(((rng.choice(cuts), needle) for needle in others), key=lambda other: other[0])
        # Where the needle starts for each cut: behind the other needles, except those at the very same cut.
        starts, waiting, passed = [], others[::-1], 0
        for cut in cuts:
            while waiting and waiting[-1][0] < cut:
                passed += len(waiting.pop()[1])
            starts.append(len(intro) + cut + passed)
        first, last = starts[0], length - asking - len(asked)
        cut_in_two = False
        if depth is None:
            if self.segment_length:
                cut_in_two = bool(self.across_segments) and rng.random() < self.across_segments
                question_segment = (length - asking) // self.segment_length
                before_segment = question_segment * self.segment_length - len(asked)
                if rng.random() >= self.outside_last_segment:
                    first = min(max(first, before_segment + 1), last)
                elif before_segment >= first:
                    last = before_segment
            depth = rng.random()
        allowed = range(bisect.bisect_left(starts, first), bisect.bisect_right(starts, last))
        # Without the end of a sentence in the last segment, the closest before it.
        allowed = allowed or range(bisect.bisect_right(starts, last))
        if cut_in_two:
            # How far into its segment a needle starts that does not fit there.
            late = max(self.segment_length - len(asked), 0)
            allowed = [i for i in allowed if starts[i] % self.segment_length > late] or allowed
        target = first + depth * (last - first)
        chosen = allowed[closest([starts[i] for i in allowed], target)]
        # Sorting is stable: the asked needle comes before others at the same cut, as `starts` has it.
        placed = sorted([(cuts[chosen], asked), *others], key=lambda other: other[0])
        ids, position = list(intro), 0
        for cut, needle in placed:
            ids += self.window(offset + position, cut - position) + needle
            position = cut
        ids += self.window(offset + position, room - position)
        *earlier, answer = append_turns(ids, turns)
        assert len(ids) == length
        start = starts[chosen]
        return Sample(ids, answer, slice(start, start + len(asked)), tuple(earlier))

    def filler(self, rng: random.Random, length: int, start: bool) -> list[int]:
        """Return `length` tokens of haystack, after the intro if they start a text."""
        intro = self.intro[:length] if start else []
        return intro + self.window(self.first_token(rng), length - len(intro))

    def first_token(self, rng: random.Random) -> int:
        """Where in the haystack a sample begins: it is the same everywhere, unless a task says otherwise."""
        return 0

    def window(self, offset: int, length: int) -> list[int]:
        """Tokens of the haystack, which goes on from its start after its end."""
        offset %= len(self.haystack)
        tokens = self.haystack[offset : offset + length]
        missing = length - len(tokens)
        return tokens + (self.haystack * (missing // len(self.haystack) + 1))[:missing] if missing else tokens

    def cuts_of_window(self, offset: int, length: int) -> list[int]:
        """Ascending places in a window at which a needle may be put; its start and end are among them."""
        size = len(self.haystack)
        shifts = range(-offset, length, size)
        inside = [cut + shift for shift in shifts for cut in self.cuts if 0 < cut + shift < length]
        return [0, *inside, length] if length else [0]


class Passkey(RetrievalTask):
    """The passkey of the paper: a number between sentences that repeat.

    Args:
        digits: of the number.
        random_start: begin at any token of the sentences. In training it lets segments cut them at all places, as those of a
            long text do; else each sample begins with the first sentence, as the paper's.
        segment_length, outside_last_segment, across_segments, absent: see `RetrievalTask`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        digits: int = 5,
        random_start: bool = False,
        segment_length: int | None = None,
        outside_last_segment: float = 0.85,
        across_segments: float = 0.0,
        absent: float = 0.0,
    ):
        super().__init__(
            segment_length=segment_length,
            outside_last_segment=outside_last_segment,
            across_segments=across_segments,
            absent=absent,
        )
        if digits < 1:
            raise ValueError(f"digits is {digits}: give at least 1")
        self.tokenizer, self.digits, self.random_start = tokenizer, digits, random_start
        self.intro = opening_ids(tokenizer) + plain_ids(tokenizer, INTRO)
        self.haystack = inner_ids(tokenizer, FILLER)
        self.cuts = sentence_ends(tokenizer, self.haystack)

    def first_token(self, rng):
        return rng.randrange(len(self.haystack)) if self.random_start else 0

    def draw(self, rng):
        key = rng.randrange(10 ** (self.digits - 1), 10**self.digits)
        needle = f" The pass key is {key}. Remember it. {key} is the pass key."
        parts = (needle, " What is the pass key? The pass key is", f" {key}.")
        needle, question, answer = (inner_ids(self.tokenizer, part) for part in parts)
        return [needle], [question, answer]


class Needle(RetrievalTask):
    """A value under a key, hidden in prose, in RULER's words.

    Args:
        haystack: the prose, as tokens or as a text; without it, the sentences of `Passkey`. Each sample begins at
            another of its sentences.
        values: `"numbers"` (seven digits), `"words"` or `"uuids"`.
        few_digits: share of the numbers that have two or three different digits only: one that is copied by looking at the
            digit before goes wrong there.
        num_needles: values in a sample, each under a key of its own.
        num_questions: how many of them are asked for, one after another: more to learn from a long text.
        haystack_numbers: share of the haystack's words before which a number is put, to be told from the needles': books
            have hardly any.
        segment_length, outside_last_segment, across_segments, absent: see `RetrievalTask`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        haystack: Sequence[int] | str | None = None,
        haystack_numbers: float = 0.0,
        values: str = "numbers",
        few_digits: float = 0.0,
        num_needles: int = 1,
        num_questions: int = 1,
        segment_length: int | None = None,
        outside_last_segment: float = 0.85,
        across_segments: float = 0.0,
        absent: float = 0.0,
    ):
        super().__init__(
            segment_length=segment_length,
            outside_last_segment=outside_last_segment,
            across_segments=across_segments,
            absent=absent,
        )
        if values not in VALUES:
            raise ValueError(f"values is {values!r}: choose one of {', '.join(VALUES)}")
        if not 1 <= num_needles <= len(ADJECTIVES) * len(NOUNS):
            raise ValueError(f"num_needles is {num_needles}: give 1 to {len(ADJECTIVES) * len(NOUNS)}")
        if not 1 <= num_questions <= num_needles:
            raise ValueError(f"num_questions is {num_questions}: give 1 to num_needles, which is {num_needles}")
        for name, share in (("haystack_numbers", haystack_numbers), ("few_digits", few_digits)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is {share}: give a share, from 0 to 1")
        self.tokenizer, self.values, self.few_digits = tokenizer, values, few_digits
        self.num_needles, self.num_questions = num_needles, num_questions
        noun = f"special magic {values if num_needles > 1 else values.removesuffix('s')}"
        hidden = f"Some {noun} are hidden" if num_needles > 1 else f"A {noun} is hidden"
        quiz = f"Make sure to memorize it. I will quiz you about the {noun.removeprefix('special magic ')} afterwards."
        self.noun = f"special magic {values.removesuffix('s')}"
        self.intro = opening_ids(tokenizer) + plain_ids(tokenizer, f"{hidden} within the following text. {quiz}")
        if haystack is None or isinstance(haystack, str):
            haystack = inner_ids(tokenizer, FILLER if haystack is None else haystack)
        self.haystack = list(haystack)
        if haystack_numbers:
            self.haystack = put_numbers(tokenizer, self.haystack, haystack_numbers, random.Random(0))
        self.cuts = insertion_places(tokenizer, self.haystack)

    def first_token(self, rng):
        return rng.choice(self.cuts)

    def draw(self, rng):
        keys = draw_words(rng, self.num_needles)
        values = [self.draw_value(rng) for _ in keys]
        needles = [f" One of the special magic {self.values} for {k} is: {v}." for k, v in zip(keys, values)]
        turns = []
        for key, value in list(zip(keys, values))[: self.num_questions][::-1]:
            described = f"{self.noun} for {key} mentioned in the provided text"
            turns += [f" What is the {described}? The {described} is", f" {value}."]
        needles, turns = ([inner_ids(self.tokenizer, part) for part in parts] for parts in (needles, turns))
        return needles, turns

    def draw_value(self, rng: random.Random) -> str:
        if self.values == "numbers":
            # Without `few_digits` nothing but the number is drawn, so that a seed goes on giving the same samples.
            if self.few_digits and rng.random() < self.few_digits:
                digits = rng.sample("0123456789", rng.randint(2, 3))
                return rng.choice([digit for digit in digits if digit != "0"]) + "".join(rng.choices(digits, k=6))
            return str(rng.randrange(10**6, 10**7))
        return draw_words(rng, 1)[0] if self.values == "words" else str(uuid.UUID(int=rng.getrandbits(128), version=4))


@dataclass(frozen=True)
class BabiStory:
    """A question of a bAbI story: all facts above it, and which of them support the answer, counted from 0."""

    facts: list[str]
    question: str
    answer: str
    support: list[int]


class Babilong(RetrievalTask):
    """The facts of a bAbI story in prose, in their order, and a question about them.

    Args:
        babi: folder with `qa{babi_task}_*_train.txt`.
        babi_task: 1, 2 or 3.
        num_questions: at most, one after another: of task 1, whose facts say where somebody is, the others' places are
            asked for before the story's own question. More to learn from a long text.
        asked_between: probability that after a fact of task 1 there are questions already, as there are in bAbI's files,
            about anybody whose place is known, as far as the length allows; after each one there is another with the same
            probability.
        haystack: the prose, as tokens or as a text. Each sample begins at another of its sentences.
        segment_length: of the model; facts stand anywhere, whatever it is.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        babi: str | None = None,
        babi_task: int = 1,
        num_questions: int = 1,
        asked_between: float = 0.0,
        haystack: Sequence[int] | str | None = None,
        segment_length: int | None = None,
    ):
        super().__init__(segment_length=segment_length)
        if num_questions < 1 or (num_questions > 1 and babi_task != 1):
            raise ValueError(f"num_questions is {num_questions}: give 1, or more with babi_task 1")
        if not 0 <= asked_between < 1 or (asked_between and babi_task != 1):
            raise ValueError(f"asked_between is {asked_between}: give 0, or with babi_task 1 a number below 1")
        if babi is None or haystack is None:
            raise ValueError(
                f"{'babi' if babi is None else 'haystack'} is missing: give stories, and prose to hide them in"
            )
        self.tokenizer, self.stories = tokenizer, read_babi(babi, babi_task, "train")
        self.num_questions, self.asked_between = num_questions, asked_between
        self.intro = opening_ids(tokenizer) + plain_ids(tokenizer, BABI_INTRO)
        self.haystack = inner_ids(tokenizer, haystack) if isinstance(haystack, str) else list(haystack)
        self.cuts = insertion_places(tokenizer, self.haystack)

    def first_token(self, rng):
        return rng.choice(self.cuts)

    def sample(self, rng, length, *, depth=None, continued=False):
        """Draw a sample, see `RetrievalTask.sample`; its `needle` is the oldest fact that the answer needs. There is no
        `depth`: facts stand where they are drawn.
        """
        intro = [] if continued else self.intro
        story = rng.choice(self.stories)
        facts = [inner_ids(self.tokenizer, f" {fact}") for fact in story.facts]
        turns = [part for asked in self.questions(rng, story) for part in self.turn(asked)]
        room = length - len(intro) - sum(map(len, facts)) - sum(map(len, turns))
        if room < 0:
            raise ValueError(f"length {length} is too short for a story, by {-room} tokens: give longer sequences")
        between = self.questions_between(rng, story, room)
        room -= sum(len(part) for parts in between for part in parts)
        offset = self.first_token(rng)
        ends = self.cuts_of_window(offset, room)
        ids, position, starts, answers = list(intro), 0, [], []
        for cut, fact, asked in zip(sorted(rng.choices(ends, k=len(facts))), facts, between):
            ids += self.window(offset + position, cut - position)
            starts.append(len(ids))
            ids += fact
            answers += append_turns(ids, asked)
            position = cut
        ids += self.window(offset + position, room - position)
        oldest = min(story.support)
        needle = slice(starts[oldest], starts[oldest] + len(facts[oldest]))
        *earlier, answer = append_turns(ids, turns)
        assert len(ids) == length
        return Sample(ids, answer, needle, (*answers, *earlier))

    def questions(self, rng: random.Random, story: BabiStory) -> list[BabiStory]:
        """Return questions about the story, its own last."""
        return [*other_questions(rng, story, self.num_questions - 1), story]

    def questions_between(self, rng: random.Random, story: BabiStory, room: int) -> list[list[list[int]]]:
        """Return tokens for each fact: questions and answers by turns that come after it, of at most `room` tokens in all."""
        between = [[] for _ in story.facts]
        if not self.asked_between:
            return between
        for count in rng.sample(range(len(story.facts)), len(story.facts)):
            known = known_places(story.facts[: count + 1])
            while rng.random() < self.asked_between:
                turn = self.turn(rng.choice(known))
                room -= sum(map(len, turn))
                if room < 0:
                    return between
                between[count] += turn
        return between

    def turn(self, story: BabiStory) -> tuple[list[int], list[int]]:
        parts = (f" {babi_prompt(story.question)}", f" {story.answer}.")
        question, answer = (inner_ids(self.tokenizer, part) for part in parts)
        return question, answer


def known_places(facts: list[str]) -> list[BabiStory]:
    """Return a question for each name in facts such as "Mary moved to the bathroom.", whose answer is its last place."""
    known = {}
    for index, fact in enumerate(facts):
        name, *_, place = fact.rstrip(".").split()
        known[name] = BabiStory(facts, f"Where is {name}?", place, [index])
    return [known[name] for name in sorted(known)]


def other_questions(rng: random.Random, story: BabiStory, count: int) -> list[BabiStory]:
    """Draw questions for the places of others than the one that a story of task 1 asks for: `count`, or as many as there are."""
    if count == 0:  # stories of other tasks have other facts
        return []
    others = [other for other in known_places(story.facts) if other.question != story.question]
    return rng.sample(others, min(len(others), count))


def babi_prompt(question: str) -> str:
    """A question of bAbI's tasks 1 to 3 and the beginning of its answer, which names what is asked for, as those of the other
    tasks do: "Where is Mary? Mary is in the".
    """
    match = re.fullmatch(r"Where (is|was) (.+?)(?: before (.+))?\?", question)
    if match is None:
        return f"{question} Answer:"
    verb, sought, later = match.groups()
    opening = f"Before {later} {sought}" if later else f"{sought[0].upper()}{sought[1:]}"
    return f"{question} {opening} {verb} in the"


def read_babi(folder: str, task: int, split: str = "test") -> list[BabiStory]:
    """Return the questions of `qa{task}_*_{split}.txt` in a folder.

    Raises:
        ValueError: there is no such file, or it is not of bAbI stories.
    """
    files = sorted(Path(folder).glob(f"qa{task}_*_{split}.txt"))
    if len(files) != 1:
        raise ValueError(
            f"babi '{folder}' has {len(files)} files named qa{task}_*_{split}.txt: name a folder with one"
        )
    stories, facts, numbers = [], [], []
    for place, line in enumerate(files[0].read_text(encoding="utf-8").splitlines(), start=1):
        number, _, text = line.partition(" ")
        try:
            if int(number) == 1:
                facts, numbers = [], []
            if "\t" not in text:
                facts, numbers = [*facts, text.strip()], [*numbers, int(number)]
                continue
            question, answer, support = text.split("\t")
            support = [numbers.index(int(n)) for n in support.split()]
        except ValueError as error:
            raise ValueError(f"line {place} of '{files[0]}' is not of a bAbI story ({error})") from error
        stories.append(BabiStory(facts, question.strip(), answer.strip(), support))
    if not stories:
        raise ValueError(f"'{files[0]}' has no questions: name the folder of the bAbI stories")
    return stories


class Copy(RetrievalTask):
    """Random tokens, a gap, a cue, and the same tokens again: what a model can learn that knows no language.

    Args:
        tokenizer: its tokens without the special ones are used; or
        vocab_size: tokens are 0 to vocab_size - 1. The first token of all is the filler, the second the cue.
        num_tokens: to be repeated.
        segment_length, outside_last_segment, across_segments: see `RetrievalTask`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        vocab_size: int | None = None,
        num_tokens: int = 5,
        segment_length: int | None = None,
        outside_last_segment: float = 0.85,
        across_segments: float = 0.0,
    ):
        super().__init__(
            segment_length=segment_length,
            outside_last_segment=outside_last_segment,
            across_segments=across_segments,
        )
        if tokenizer is None and vocab_size is None:
            raise ValueError("tokenizer and vocab_size are missing: give one of them")
        if num_tokens < 1:
            raise ValueError(f"num_tokens is {num_tokens}: give at least 1")
        special = () if tokenizer is None else set(tokenizer.all_special_ids)
        size = len(tokenizer) if vocab_size is None else vocab_size
        usable = [token for token in range(size) if token not in special]
        if len(usable) < 3:
            raise ValueError(f"vocab_size is {size}: filler, cue and content need at least 3 ordinary tokens")
        filler, self.cue, *self.content = usable
        self.num_tokens = num_tokens
        self.intro = [] if tokenizer is None else opening_ids(tokenizer)
        self.haystack, self.cuts = [filler], [1]

    def draw(self, rng):
        content = rng.choices(self.content, k=self.num_tokens)
        return [content], [[self.cue], content]


TASKS = {"passkey": Passkey, "needle": Needle, "babilong": Babilong, "copy": Copy}


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text alone. Texts here may be longer than a base model's context, which is nothing to warn of."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def inner_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text as it is after a full stop: some tokenizers begin the first word of a text in another way."""
    before, whole = plain_ids(tokenizer, "."), plain_ids(tokenizer, f".{text}")
    return whole[len(before) :] if whole[: len(before)] == before else plain_ids(tokenizer, text)


def sentence_ends(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Places right after a token that ends a sentence."""
    ends = {index for token, index in tokenizer.get_vocab().items() if token.endswith((".", "!", "?"))}
    return [place for place, token in enumerate(ids, start=1) if token in ends]


def insertion_places(tokenizer: PreTrainedTokenizerBase, haystack: list[int]) -> list[int]:
    """Where something may be put into prose: after its sentences; without sentences, as in a list, anywhere."""
    if not haystack:
        raise ValueError("haystack is empty: give prose")
    return sentence_ends(tokenizer, haystack) or list(range(1, len(haystack) + 1))


def put_numbers(
    tokenizer: PreTrainedTokenizerBase, haystack: list[int], share: float, rng: random.Random
) -> list[int]:
    """Put numbers before a share of the words: of one to seven digits, some of them round, some with commas."""
    starts = {index for token, index in tokenizer.get_vocab().items() if token.startswith(WORD_STARTS)}
    ids = []
    for token in haystack:
        if token in starts and rng.random() < share:
            digits = rng.randint(1, 7)
            zeros = rng.choice((0, rng.randrange(digits)))
            number = rng.randrange(10 ** (digits - zeros)) * 10**zeros
            ids += inner_ids(tokenizer, f" {number:,}" if rng.randrange(2) else f" {number}")
        ids.append(token)
    return ids


def closest(numbers: list[int], target: float) -> int:
    """Index of the number that is closest to a target, among ascending ones."""
    after = bisect.bisect_left(numbers, target)
    return min((i for i in (after - 1, after) if 0 <= i < len(numbers)), key=lambda i: abs(numbers[i] - target))


def draw_words(rng: random.Random, count: int) -> list[str]:
    """Different words, each of an adjective and a noun."""
    numbers = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
    return [f"{ADJECTIVES[n // len(NOUNS)]}-{NOUNS[n % len(NOUNS)]}" for n in numbers]
