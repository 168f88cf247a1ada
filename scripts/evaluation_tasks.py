"""What `scripts/evaluate.py` asks of a model: questions about long texts, the loss of books and summaries of them, gates,
what is in a memory.

    reader, task = Reader(model), TASKS["passkey"](tokenizer)
    haystack = Haystack.of(task, random.Random(0))
    questions = hide(task, haystack, [random.Random(i) for i in range(20)], length=4096, depth=0.5)
    Trunk(reader, haystack).ask(questions, batch_size=20)  # the tokens of each answer, as `generate` decodes them

Everything streams: a text is looked at piece by piece, and no list of all its tokens is ever made. The questions of a
length share one haystack, which is read once up to where something is hidden; from there its memory is branched, one row
for each text, and at its end once more, for each question about that text. An answer is that of `generate` on the whole
prompt, because any split of a text and any batch gives the same result (up to rounding).
"""

import bisect
import copy
import itertools
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from infini_llama.cache_infini import InfiniCache
from infini_llama.configuration_infini import InfiniLlamaConfig
from infini_llama.modeling_infini import CACHE
from infini_llama.scripts import generate
from infini_llama.scripts.generate import InputError
from infini_llama.scripts.retrieval_tasks import (
    BABI_INTRO,
    BabiStory,
    RetrievalTask,
    babi_prompt,
    inner_ids,
    opening_ids,
    other_questions,
    plain_ids,
)

__all__ = [
    "Book",
    "Haystack",
    "Prompt",
    "Question",
    "Reader",
    "Trunk",
    "ask_local",
    "babi_intro",
    "bucket",
    "bucket_label",
    "effective_rank",
    "gates",
    "go_on",
    "hide",
    "hide_stories",
    "losses_by_segments",
    "memory_growth",
    "read_books",
    "rouge",
    "summary_prompt",
    "take_tokens",
    "window_prompt",
]

# Logits are the largest tensor by far: this many tokens have them at a time.
LOGITS_TOKENS = 1024
# Tokens per call of a model without segments.
CALL_TOKENS = 4096
# So many tokens after a word show whether it has ended.
WORD_END = 2
SUMMARISE = "Summarize the book above: what happens in it, from its beginning to its end, and to whom."


# Texts that are put together where they are looked at


@dataclass(frozen=True)
class Haystack:
    """An introduction and a text without an end: after its last token it goes on from its first.

    Args:
        intro: (T,) tokens.
        tokens: (T,) int32 tokens of the text.
        cuts: ascending places in it, from 1 on, where something may be inserted.
        offset: with which of its tokens it begins.
    """

    intro: torch.Tensor
    tokens: torch.Tensor
    cuts: list[int]
    offset: int = 0

    @classmethod
    def of(cls, task: RetrievalTask, rng: random.Random) -> "Haystack":
        """The haystack of a task; where it begins is drawn."""
        tokens = torch.tensor(task.haystack, dtype=torch.int32)
        return cls(torch.tensor(task.intro, dtype=torch.long), tokens, task.cuts, task.first_token(rng))

    def __getitem__(self, where: slice) -> torch.Tensor:
        """Tokens of the text alone, counted from its offset."""
        return self.tokens[(torch.arange(where.start, where.stop) + self.offset) % len(self.tokens)].long()

    def nearest_cut(self, target: float, room: int) -> int:
        """The place closest to `target` among those where something may be inserted into the first `room` tokens."""
        places = [0, room]
        if self.cuts and room:
            period, rest = divmod(target + self.offset, len(self.tokens))
            after = bisect.bisect_left(self.cuts, rest)
            for turns, index in (divmod(i, len(self.cuts)) for i in (after - 1, after)):
                places.append((int(period) + turns) * len(self.tokens) + self.cuts[index] - self.offset)
        return min((p for p in places if 0 <= p <= room), key=lambda p: abs(p - target))


class Prompt:
    """A haystack with something inserted and a question behind it; a few numbers, whatever its length.

    Args:
        haystack: its introduction comes first.
        room: tokens of the haystack's text.
        inserts: (place, tokens) in ascending order; the place counts tokens of the text.
        question: tokens.
    """

    def __init__(self, haystack: Haystack, room: int, inserts: list[tuple[int, list[int]]], question: list[int]):
        self.parts: list[torch.Tensor | slice] = [haystack.intro]
        # What comes before the question; prompts along one haystack that are equal in it can be read together.
        self.text = (room, tuple((cut, tuple(tokens)) for cut, tokens in inserts))
        # Where each insert begins and ends.
        self.spans: list[tuple[int, int]] = []
        self.haystack, self.length, place = haystack, len(haystack.intro), 0
        for cut, tokens in inserts:
            self._add(slice(place, cut), cut - place)
            self.spans.append((self.length, self.length + len(tokens)))
            self._add(torch.tensor(tokens, dtype=torch.long), len(tokens))
            place = cut
        self._add(slice(place, room), room - place)
        self.question = self.length
        self._add(torch.tensor(question, dtype=torch.long), len(question))
        # How many tokens are those of the bare haystack.
        self.shared = self.spans[0][0] if self.spans else self.question

    def _add(self, part: torch.Tensor | slice, length: int) -> None:
        self.parts.append(part)
        self.length += length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, where: slice) -> torch.Tensor:
        """Tokens from `where.start` to `where.stop`, (T,)."""
        start, stop, place, pieces = where.start or 0, min(where.stop or self.length, self.length), 0, []
        for part in self.parts:
            size = len(part) if torch.is_tensor(part) else part.stop - part.start
            first, last = max(start - place, 0), min(stop - place, size)
            if first < last:
                is_text = not torch.is_tensor(part)
                pieces.append(self.haystack[part.start + first : part.start + last] if is_text else part[first:last])
            place += size
        return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.long)


@dataclass(frozen=True)
class Question:
    """A prompt and the one right answer.

    Args:
        prompt: what the model reads.
        answer: its tokens. As many are decoded, which have to be this text; of a `word`, `WORD_END` more.
        evidence_end: where the oldest thing ends that has to be remembered.
        word: only the first word of what is decoded has to be right.
    """

    prompt: Prompt
    answer: list[int]
    evidence_end: int
    word: str | None = None

    @property
    def decoded_tokens(self) -> int:
        return len(self.answer) + WORD_END * (self.word is not None)

    def is_right(self, tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether decoded tokens are the whole answer, as text: another cut into tokens is no mistake."""
        if self.word is not None:
            found = re.match(r"\W*(\w+)", tokenizer.decode(tokens))
            return found is not None and found[1].lower() == self.word.lower()
        answer = tokenizer.decode(self.answer)
        return any(tokenizer.decode(tokens[:end]) == answer for end in range(1, len(tokens) + 1))

    def compressions(self, segment_length: int) -> int:
        """Segments that were completed between the evidence and the question."""
        return self.prompt.question // segment_length - (self.evidence_end - 1) // segment_length


def hide(
    task: RetrievalTask, haystack: Haystack, rngs: list[random.Random], length: int, depth: float
) -> list[Question]:
    """Draw questions of a retrieval task, whose prompts have one length.

    Args:
        task: with one question to a sample.
        haystack: of the task.
        rngs: one for each question; the same states give the same questions.
        length: tokens of a prompt and the longest answer. So where a length is whole segments, as in training, no answer
            begins a segment of its own, from which local attention would not see the question.
        depth: where in the haystack the needle is, from 0 to 1, to the next end of a sentence; other needles are anywhere.
    """
    draws, questions = [task.draw(rng) for rng in rngs], []
    longest = max(len(answer) for _, (_, answer) in draws)
    for rng, (needles, (question, answer)) in zip(rngs, draws):
        room = length - longest - len(haystack.intro) - sum(map(len, needles)) - len(question)
        if room < 0:
            needed = length - room
            raise InputError(f"length {length} is too short for a {type(task).__name__}: give at least {needed}")
        asked, *others = needles
        # Sorting is stable, so that the asked needle comes before others at the same place.
        inserts = [(haystack.nearest_cut(depth * room, room), asked)]
        inserts += [(haystack.nearest_cut(rng.uniform(0, room), room), other) for other in others]
        order = sorted(range(len(inserts)), key=lambda i: inserts[i][0])
        prompt = Prompt(haystack, room, [inserts[i] for i in order], question)
        questions.append(Question(prompt, answer, prompt.spans[order.index(0)][1]))
    return questions


# BABILong (arXiv 2406.10149): the facts of bAbI stories in books


def babi_intro(tokenizer: PreTrainedTokenizerBase, examples: list[BabiStory]) -> torch.Tensor:
    """Tokens of what comes before the text: what it is about, and examples with their answers."""
    shown = [f" {' '.join(e.facts)} {babi_prompt(e.question)} {e.answer}." for e in examples]
    return torch.tensor(opening_ids(tokenizer) + plain_ids(tokenizer, "".join([BABI_INTRO, *shown])))


def hide_stories(
    tokenizer: PreTrainedTokenizerBase,
    haystack: Haystack,
    stories: list[BabiStory],
    rngs: list[random.Random],
    length: int,
    num_questions: int = 1,
) -> list[Question]:
    """Hide the facts of stories, in their order, at places that are drawn evenly.

    Args:
        haystack: book text, behind `babi_intro`.
        rngs: one for each story.
        length: tokens of the longest prompt of a story and the longest answer, as for `hide`; 0 for the story alone.
        num_questions: about a story of task 1, at most, all about one text: its own, and others' places.
    """
    asked = [[story, *other_questions(rng, story, num_questions - 1)] for story, rng in zip(stories, rngs)]
    answers = {about.answer: plain_ids(tokenizer, f" {about.answer}") for group in asked for about in group}
    questions, longest = [], max(map(len, answers.values())) + WORD_END
    for story, rng, group in zip(stories, rngs, asked):
        facts = [inner_ids(tokenizer, f" {fact}") for fact in story.facts]
        asking = [inner_ids(tokenizer, f" {babi_prompt(about.question)}") for about in group]
        needed = len(haystack.intro) + sum(map(len, facts)) + max(map(len, asking)) + longest
        room = length - needed if length else 0
        if room < 0:
            raise InputError(
                f"length {length} is too short for a story of {needed} tokens: give at least that many, 0 for the "
                "story alone, or fewer --shots"
            )
        cuts = sorted(haystack.nearest_cut(rng.uniform(0, room), room) for _ in facts)
        for about, question in zip(group, asking):
            prompt = Prompt(haystack, room, list(zip(cuts, facts)), question)
            evidence_end = min(prompt.spans[i][1] for i in about.support)
            questions.append(Question(prompt, answers[about.answer], evidence_end, about.answer))
    return questions


# Summaries of whole books, as in the paper's BookSum setting


@dataclass(frozen=True)
class Book:
    """A text, and the summary that another one is compared with."""

    text: str
    summary: str


def read_books(path: str) -> Iterator[Book]:
    """Yield the books of a JSONL file, of which one is held at a time."""
    count = 0
    try:
        with open(path, "rb") as lines:
            for place, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    book = Book(row["text"].strip(), row["summary"].strip())
                    if not (book.text and book.summary):
                        raise ValueError("one of them is empty")
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    raise InputError(
                        f"line {place} of --books '{path}' is no book ({error}): make it a JSON object in UTF-8, with "
                        "the strings text and summary"
                    ) from error
                count += 1
                yield book
    except OSError as error:
        raise InputError(f"--books '{path}' cannot be read ({error.strerror}): name a JSONL file") from error
    if not count:
        raise InputError(f"--books '{path}' is empty: give it a line for each book")


def summary_prompt(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    segment_length: int,
    num_tokens: int,
    *,
    chat: bool = False,
    limit: int | None = None,
) -> Prompt:
    """A book, and the instruction to summarise it.

    The book is cut at its end, by as little as makes instruction and summary lie in one segment, if they fit: otherwise
    local attention alone would lose sight of what it has to do.

    Args:
        segment_length: N.
        num_tokens: of the longest summary.
        chat: whether book and instruction are one turn of the user, as in `scripts/generate.py`.
        limit: tokens of the book after which it is left.
    """
    opening = generate.opening_ids(tokenizer, chat)
    instruction = SUMMARISE if chat else f"\n\n{SUMMARISE}\n\nSummary:"
    question = generate.question_ids(tokenizer, instruction, chat=chat)[0].tolist()
    blocks = (text[i : i + generate.BLOCK_BYTES] for i in range(0, len(text), generate.BLOCK_BYTES))
    pieces = [torch.tensor(plain_ids(tokenizer, p), dtype=torch.int32) for p in generate.cut_at_newlines(blocks)]
    tokens = torch.cat(pieces)[:limit]
    last_start = max(segment_length - len(question) - num_tokens, 0)
    surplus = max((len(opening) + len(tokens)) % segment_length - last_start, 0)
    haystack = Haystack(torch.tensor(opening, dtype=torch.long), tokens, [])
    return Prompt(haystack, max(len(tokens) - surplus, 0), [], question)


def window_prompt(prompt: Prompt, tokens: int) -> Prompt:
    """A prompt of so many tokens, if its question is no longer: the same one with the end of its text only."""
    intro, question = prompt.haystack.intro, prompt[prompt.question :].tolist()
    room = prompt.question - len(intro)
    kept = min(room, max(tokens - len(intro) - len(question), 0))
    haystack = Haystack(intro, prompt.haystack.tokens, [], prompt.haystack.offset + room - kept)
    return Prompt(haystack, kept, [], question)


def rouge(summary: str, reference: str) -> dict[str, float]:
    """F1 of stemmed words, of pairs of them, and of their longest common subsequence, from 0 to 1."""
    from rouge_score.rouge_scorer import RougeScorer

    scores = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(reference, summary)
    return {name: float(score.fmeasure) for name, score in scores.items()}


# Models


class Reader:
    """A causal language model, ours or another one, as something that reads on.

    Args:
        model: with a forward as in Transformers.
        new_cache: makes the empty cache that a text begins with.
    """

    def __init__(self, model: Any, new_cache: Callable[[], Cache] | None = None):
        self.model, self.config = model, model.config
        self.has_memory = isinstance(model.config, InfiniLlamaConfig)
        cache = InfiniCache if self.has_memory else DynamicCache
        self.new_cache = new_cache or (lambda: cache(config=self.config))

    @torch.no_grad()
    def logits(self, ids: torch.Tensor, cache: Cache | None = None, keep: int = 0) -> torch.Tensor:
        """Logits (B, T or `keep`, vocab) of tokens (B, T)."""
        ids = ids.to(self.model.device)
        cached = {"use_cache": False} if cache is None else {CACHE: cache, "use_cache": True}
        return self.model(input_ids=ids, logits_to_keep=keep, **cached).logits

    def read(
        self, prompts: list[Prompt], cache: Cache, start: int, stop: int, progress: tqdm | None = None
    ) -> torch.Tensor | None:
        """Read tokens `start` to `stop` of prompts into a cache with a row for each; logits (B, vocab) of the last."""
        # All rows together are as wide as a block, and calls end where segments do, which is fastest.
        segment = self.config.segment_length if self.has_memory else 1
        block = self.config.block_length if self.has_memory else CALL_TOKENS
        width = max(block // len(prompts) // segment, 1) * segment
        logits = None
        while start < stop:
            end = min(start - start % segment + width, stop)
            ids = torch.stack([prompt[start:end] for prompt in prompts])
            logits = self.logits(ids, cache, keep=1)[:, -1]
            if progress is not None:
                progress.update(ids.numel())
            start = end
        return logits

    def decode(self, logits: torch.Tensor, cache: Cache, num_tokens: int) -> list[list[int]]:
        """The likeliest tokens of each row, one after another, as `generate` takes them without sampling."""
        tokens = [logits.argmax(-1)]
        while len(tokens) < num_tokens:
            tokens.append(self.logits(tokens[-1][:, None], cache, keep=1)[:, -1].argmax(-1))
        return torch.stack(tokens, dim=1).tolist()

    @contextmanager
    def memory_off(self) -> Iterator[None]:
        """Inside it, a model of ours sees each segment alone."""
        rule, self.config.memory_update = self.config.memory_update, "none"
        try:
            yield
        finally:
            self.config.memory_update = rule


def batches(questions: list[Question], indices: Iterable[int], batch_size: int) -> list[list[int]]:
    """Indices of questions, those whose prompts are of one length together, in the order in which they leave the haystack."""
    order = sorted(indices, key=lambda i: (len(questions[i].prompt), questions[i].prompt.shared))
    lists = [list(group) for _, group in itertools.groupby(order, key=lambda i: len(questions[i].prompt))]
    return [group[i : i + batch_size] for group in lists for i in range(0, len(group), batch_size)]


class Trunk:
    """Reads a haystack once, for all that is hidden in it.

    Args:
        reader: the model.
        haystack: of all questions.
    """

    def __init__(self, reader: Reader, haystack: Haystack):
        self.reader, self.haystack, self.cache, self.tokens = reader, haystack, reader.new_cache(), 0

    def branch(self, tokens: int, num_rows: int, progress: tqdm | None = None) -> Cache:
        """A cache of rows that have all read the first tokens of the bare haystack."""
        if tokens < self.tokens:
            self.cache, self.tokens = self.reader.new_cache(), 0
        bare = Prompt(self.haystack, max(tokens - len(self.haystack.intro), 0), [], [])
        self.reader.read([bare], self.cache, self.tokens, tokens, progress)
        self.tokens = tokens
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(num_rows)
        return cache

    def ask(self, questions: list[Question], batch_size: int, name: str = "reading") -> list[list[int]]:
        """Return what the model answers to each question, as tokens; it reads all that comes before."""
        answers: list[list[int]] = [[] for _ in questions]
        texts: dict[Any, list[int]] = {}
        for i, question in enumerate(questions):
            texts.setdefault(question.prompt.text, []).append(i)
        order = sorted(texts.values(), key=lambda text: questions[text[0]].prompt.shared)
        plan, total, here = [], 0, self.tokens
        for rows in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
            prompts = [questions[text[0]].prompt for text in rows]
            row_of = {i: row for row, text in enumerate(rows) for i in text}
            # From where rows differ, and to where all of them read what comes before a question.
            shared, stop = min(p.shared for p in prompts), min(p.question for p in prompts)
            plan.append((prompts, row_of, shared, stop))
            total += (shared - here if shared >= here else shared) + (stop - shared) * len(rows)
            total += sum(len(questions[i].prompt) - stop for i in row_of)
            here = shared
        with bar(name, total) as progress:
            for prompts, row_of, shared, stop in plan:
                cache = self.branch(shared, len(prompts), progress)
                self.reader.read(prompts, cache, shared, stop, progress)
                *others, last = batches(questions, row_of, batch_size)
                for batch in [*others, last]:
                    branch = cache if batch is last else copy.deepcopy(cache)
                    if (rows := [row_of[i] for i in batch]) != list(range(len(prompts))):
                        branch.batch_select_indices(torch.tensor(rows))
                    asked = [questions[i].prompt for i in batch]
                    logits = self.reader.read(asked, branch, stop, len(asked[0]), progress)
                    answer(self.reader, [(questions[i], answers[i]) for i in batch], logits, branch)
        return answers


def ask_local(
    reader: Reader, questions: list[Question], batch_size: int, segment_length: int, opening: list[int] | None = None
) -> list[list[int]]:
    """Return what a model answers that sees the last tokens only.

    Args:
        reader: to be asked; of a model of ours the memory should be off.
        segment_length: N. The model sees the segment that the prompt ends in: all that local attention ever sees.
        opening: if given, it sees N tokens instead, the answer and these, which come before a text, included.
    """
    answers: list[list[int]] = [[] for _ in questions]
    longest = max(question.decoded_tokens for question in questions)
    for batch in batches(questions, range(len(questions)), batch_size):
        prompts = [questions[i].prompt for i in batch]
        end = len(prompts[0])
        if opening is None:
            start, before = (end - 1) // segment_length * segment_length, torch.zeros(0, dtype=torch.long)
        else:
            start, before = end - min(end, max(segment_length - longest, 1)), torch.tensor(opening, dtype=torch.long)
            start, before = (start + len(before), before) if start > 0 else (0, before[:0])
        ids = torch.stack([torch.cat([before, prompt[start:end]]) for prompt in prompts])
        # Few enough rows at a time that these are no larger than the blocks of a long text.
        rows = max(1, CALL_TOKENS // ids.shape[1])
        for first in range(0, len(batch), rows):
            cache = reader.new_cache()
            logits = reader.logits(ids[first : first + rows], cache, keep=1)[:, -1]
            answer(reader, [(questions[i], answers[i]) for i in batch[first : first + rows]], logits, cache)
    return answers


def answer(reader: Reader, asked: list[tuple[Question, list[int]]], logits: torch.Tensor, cache: Cache) -> None:
    """Decode answers to questions into their lists, each as long as the right one."""
    decoded = reader.decode(logits, cache, max(question.decoded_tokens for question, _ in asked))
    for (question, tokens), row in zip(asked, decoded):
        tokens += row[: question.decoded_tokens]


def go_on(
    reader: Reader, prompt: Prompt, num_tokens: int, ends: set[int], name: str = "reading", start: int = 0
) -> list[int]:
    """Return the likeliest tokens after a prompt, one after another, up to one of `ends`, which is left out.

    Args:
        num_tokens: at most.
        start: where in the prompt the model begins to read, at the start of a segment.
    """
    cache, said = reader.new_cache(), []
    with bar(name, len(prompt) - start) as progress:
        logits = reader.read([prompt], cache, start, len(prompt), progress)
    while (token := int(logits.argmax())) not in ends:
        said.append(token)
        if len(said) == num_tokens:
            break
        logits = reader.logits(torch.tensor([[token]]), cache, keep=1)[:, -1]
    return said


def bar(name: str, total: int | None) -> tqdm:
    return tqdm(desc=name, total=total, unit=" tokens", unit_scale=True, leave=False, dynamic_ncols=True)


# Whole texts


def take_tokens(
    tokenizer: PreTrainedTokenizerBase, pieces: Iterable[str], width: int, limit: int | None = None
) -> Iterator[torch.Tensor]:
    """Yield the tokens of a text, (width,) at a time, the last ones fewer.

    Args:
        pieces: the text, cut where tokens end.
        limit: tokens after which it is left.
    """
    waiting = torch.tensor(opening_ids(tokenizer), dtype=torch.long)
    left = limit
    for piece in itertools.chain(pieces, [None]):
        if piece is not None:
            waiting = torch.cat([waiting, torch.tensor(plain_ids(tokenizer, piece), dtype=torch.long)])
        while len(waiting) >= width or (piece is None and len(waiting)):
            tokens, waiting = waiting[:width][:left], waiting[width:]
            if len(tokens):
                yield tokens
            left = None if left is None else left - len(tokens)
            if left == 0:
                return


def bucket(segments: int) -> int:
    """0 for none, and 1 + log2 for 1, 2-3, 4-7, ... completed segments."""
    return segments.bit_length()


def bucket_label(index: int) -> str:
    first, last = (0, 0) if index == 0 else (2 ** (index - 1), 2**index - 1)
    return str(first) if first == last else f"{first}-{last}"


def losses_by_segments(
    systems: dict[str, Reader], chunks: Iterable[torch.Tensor], segment_length: int, name: str = "reading"
) -> dict[str, dict[str, tuple[float, int]]]:
    """Loss of a text by how many segments were completed before the token that predicts.

    Args:
        systems: of `"memory"` and `"model"`, which read the whole text, and `"off"` and `"window"`, which see each
            segment by itself; all predict the same tokens.
        chunks: tokens of the text, whole segments each, the last aside.
        segment_length: N.

    Returns:
        system -> bucket -> sum of the losses, and of how many tokens.
    """
    sums = {system: torch.zeros(2, 64, dtype=torch.float64) for system in systems}
    caches = {system: reader.new_cache() for system, reader in systems.items()}
    position = 0
    chunks = iter(chunks)
    tokens = next(chunks, None)
    with bar(name, None) as progress:
        while tokens is not None:
            following = next(chunks, None)
            targets = tokens[1:] if following is None else torch.cat([tokens[1:], following[:1]])
            inputs = tokens[: len(targets)]
            if not len(inputs):  # one token is left, and predicts nothing
                break
            index = torch.tensor([bucket(p // segment_length) for p in range(position, position + len(inputs))])
            for system, reader in systems.items():
                if system in ("off", "window"):
                    losses = segment_losses(reader, inputs, targets, segment_length, off=system == "off")
                else:
                    width = max(LOGITS_TOKENS // segment_length * segment_length, min(segment_length, LOGITS_TOKENS))
                    losses = torch.cat(
                        [
                            token_losses(reader.logits(ids[None], caches[system]), target[None])[0]
                            for ids, target in zip(inputs.split(width), targets.split(width))
                        ]
                    )
                sums[system][0].index_add_(0, index, losses.double())
                sums[system][1].index_add_(0, index, torch.ones(len(index), dtype=torch.float64))
            position += len(inputs)
            progress.update(len(inputs))
            tokens = following
    return {
        system: {
            bucket_label(i): (total[0, i].item(), int(total[1, i])) for i in total[1].nonzero().flatten().tolist()
        }
        for system, total in sums.items()
    }


def segment_losses(
    reader: Reader, inputs: torch.Tensor, targets: torch.Tensor, segment_length: int, off: bool
) -> torch.Tensor:
    """Losses (T,) of a model that sees each segment by itself."""
    losses, whole = [], len(inputs) // segment_length * segment_length
    rows = max(1, LOGITS_TOKENS // segment_length)
    batched = [(inputs[:whole].view(-1, segment_length), targets[:whole].view(-1, segment_length))]
    batched.append((inputs[None, whole:], targets[None, whole:]))
    for ids, target in batched:
        for some, wanted in zip(ids.split(rows), target.split(rows)) if ids.numel() else ():
            if off:
                with reader.memory_off():
                    logits = reader.logits(some)
            else:
                logits = reader.logits(some)
            losses.append(token_losses(logits, wanted).flatten())
    return torch.cat(losses)


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy (B, T) of logits (B, T, vocab), on the CPU."""
    targets = targets.to(logits.device)
    parts = zip(logits.split(256, dim=1), targets.split(256, dim=1))
    return torch.cat([F.cross_entropy(x.float().mT, y, reduction="none") for x, y in parts], dim=1).cpu()


# What is inside


@torch.no_grad()
def gates(model: Any) -> list[list[float]]:
    """Share of the memory in the output, sigmoid(beta), of each head of each layer."""
    return [torch.sigmoid(layer.self_attn.memory_gate().float()).tolist() for layer in model.model.layers]


def effective_rank(matrix: torch.Tensor) -> torch.Tensor:
    """exp of the entropy of the singular values, taken as shares of their sum, of (..., D, V); 0 of a zero matrix."""
    values = torch.linalg.svdvals(matrix.float().cpu())
    total = values.sum(-1, keepdim=True)
    share = values / total.where(total > 0, torch.ones(()))
    return torch.exp(torch.special.entr(share).sum(-1)) * (total[..., 0] > 0)


def memory_growth(reader: Reader, chunks: Iterable[torch.Tensor], name: str = "reading") -> dict[str, dict[str, Any]]:
    """How full the memory becomes: what is in it after 1, 2, 4, ... segments of a text, and after the last one.

    Args:
        chunks: tokens of the text, one segment each, the last aside.

    Returns:
        segments -> `effective_rank` of M, `matrix_norm` and `normalizer_norm`, per layer, means over heads.
    """
    cache, growth, segments, waiting = reader.new_cache(), {}, 0, []
    segment_length = reader.config.segment_length
    at_once = reader.config.block_length // segment_length

    def flush() -> None:
        if waiting:
            reader.logits(torch.cat(waiting)[None], cache, keep=1)
            waiting.clear()

    def measure() -> None:
        flush()
        rows = [
            (effective_rank(m.matrix), m.matrix.norm(dim=(-2, -1)), m.normalizer.flatten(2).norm(dim=-1))
            for m in cache
        ]
        names = ("effective_rank", "matrix_norm", "normalizer_norm")
        growth[str(segments)] = {n: [row[i].mean().item() for row in rows] for i, n in enumerate(names)}

    with bar(name, None) as progress:
        for tokens in chunks:
            if len(tokens) < segment_length:
                break
            waiting.append(tokens)
            segments += 1
            progress.update(len(tokens))
            if segments & (segments - 1) == 0:
                measure()
            elif len(waiting) == at_once:
                flush()
        if segments and str(segments) not in growth:
            measure()
    return growth
