"""`scripts/retrieval_tasks.py` and `scripts/training_data.py`: what a model is trained on, token by token."""

import copy
import gzip
import itertools
import json
import random
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from infini_llama.scripts.retrieval_tasks import FILLER, INTRO, TASKS, Copy, Needle, Passkey
from infini_llama.scripts.training_data import Batch, Mixture

SEGMENT = 64
PROSE = "It was late. Nobody came! Was the road closed? The lamp burned low, and then it went out. " * 9


@pytest.fixture(autouse=True, scope="module")
def own_cache() -> Iterator[None]:
    """`datasets` writes what it has read to a cache: not to the user's."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield


def text_tokenizer(begin: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as in SmolLM2 and Llama 3; it begins texts with a token if it is asked to."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<begin>", "<end>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([INTRO + FILLER, PROSE], trainer)
    if begin:
        special = [("<begin>", tokenizer.token_to_id("<begin>"))]
        tokenizer.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<begin>", eos_token="<end>")


def number_tokenizer() -> PreTrainedTokenizerFast:
    """A word is a number, and its token is that number: so a test can tell every token of a text from every other."""
    words = {str(number): number for number in range(1000)} | {"<end>": 1000}
    tokenizer = Tokenizer(models.WordLevel(words))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


END = 1000
TEXT = text_tokenizer()
NUMBERS = number_tokenizer()


def make_task(name: str, **options):
    return TASKS[name](TEXT, segment_length=SEGMENT, **options)


def write_jsonl(path: Path, documents: list[list[int]]) -> Path:
    """A document is the words of its numbers."""
    path.write_text("".join(json.dumps({"text": " ".join(map(str, d))}) + "\n" for d in documents), encoding="utf-8")
    return path


def numbered(*lengths: int) -> list[list[int]]:
    """Documents without a common token."""
    counter = itertools.count()
    return [list(itertools.islice(counter, length)) for length in lengths]


def numbers_mixture(*specs: dict | str, segment: int = 2, seed: int = 0) -> Mixture:
    return Mixture(list(specs), NUMBERS, segment, seed)


def stream(mixture: Mixture, count: int, length: int = 2) -> list[int]:
    """The next `count` tokens of a mixture of one text."""
    batches = [mixture.next(1, length) for _ in range(-(-count // length))]
    return torch.cat([batch.input_ids[0] for batch in batches])[:count].tolist()


def decoded_text(mixture: Mixture, tokens: int) -> str:
    return TEXT.decode(stream(mixture, tokens, 1))


def same(left: Batch, right: Batch) -> bool:
    tensors = ("input_ids", "position_ids", "labels", "loss_weights")
    return left.source == right.source and all(torch.equal(getattr(left, t), getattr(right, t)) for t in tensors)


# Tasks


@given(
    st.sampled_from(["passkey", "needle", "copy"]),
    st.integers(300, 1500),
    st.none() | st.floats(0, 1),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_a_sample_is_whole_and_has_the_length_asked_for(name, length, depth, continued, seed):
    """Exactly `length` tokens, the answer last, and the needle uncut, with the answer in it."""
    task = make_task(name)
    rng = random.Random(seed)
    (needle, *_), (question, answer) = task.draw(random.Random(seed))
    sample = task.sample(rng, length, depth=depth, continued=continued)
    assert len(sample.ids) == length == sample.answer.stop
    assert sample.ids[sample.answer] == answer
    assert sample.ids[: sample.answer.start][-len(question) :] == question
    assert sample.ids[sample.needle] == needle
    assert sample.needle.stop <= sample.answer.start - len(question)
    assert any(needle[i : i + len(answer)] == answer for i in range(len(needle)))


def test_the_passkey_reads_as_in_the_paper():
    task = make_task("passkey")
    parts = map(len, (task.intro, *itertools.chain(*task.draw(random.Random(5)))))
    sample = task.sample(random.Random(5), sum(parts) + 3 * len(task.haystack), depth=0.34)
    text = TEXT.decode(sample.ids)
    key = TEXT.decode(sample.ids[sample.answer]).strip(" .")
    needle = f" The pass key is {key}. Remember it. {key} is the pass key."
    assert text == f"{INTRO}{FILLER}{needle}{FILLER}{FILLER} What is the pass key? The pass key is {key}."
    assert len(key) == 5 and key.isdigit()


def test_a_passkey_that_starts_anywhere_lets_segments_cut_its_sentences_at_all_places():
    """Samples and fillers; otherwise they begin with the first sentence, always."""
    length = 4 * SEGMENT + 60
    for random_start, starts in ((False, 1), (True, len(Passkey(TEXT).haystack))):
        task = Passkey(TEXT, random_start=random_start)
        texts = {tuple(task.filler(random.Random(i), 12, start=False)) for i in range(400)}
        assert len(texts) == starts
        samples = [task.sample(random.Random(i), length, depth=1.0, continued=True) for i in range(400)]
        assert len({tuple(sample.ids[:12]) for sample in samples}) == starts
        assert all(len(sample.ids) == length for sample in samples)


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Puts a space before every text, as Llama 2 does: a text that begins with one then begins with two."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    texts = [INTRO, FILLER, "What is the pass key? The pass key is. Remember it.", "1 2 3 4 5 6 7 8 9"]
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_parts_are_the_tokens_of_the_whole_text():
    """Tokenised by themselves, they give what the tokenizer makes of the text, whatever it does to first words."""
    for tokenizer in (TEXT, text_tokenizer(begin=True), sentencepiece_tokenizer()):
        task = Passkey(tokenizer, digits=1)
        (needle,), (question, answer) = task.draw(random.Random(0))
        length = len(task.intro + needle + question + answer) + 2 * len(task.haystack)
        sample = task.sample(random.Random(0), length, depth=0.5)
        text = tokenizer.decode(sample.ids, skip_special_tokens=True)
        assert sample.ids == tokenizer(text)["input_ids"] and text.startswith(INTRO + FILLER)


@pytest.mark.parametrize("name", ["passkey", "needle"])
def test_needles_stand_between_sentences_at_the_depth_asked_for(name):
    task = make_task(name, **{"haystack": PROSE} if name == "needle" else {})
    stops = {TEXT.convert_tokens_to_ids(stop) for stop in ".!?"}
    for depth in (0, 0.1, 0.25, 0.5, 0.9, 1):
        sample = task.sample(random.Random(1), 1024, depth=depth)
        _, (question, answer) = task.draw(random.Random(1))
        size = sample.needle.stop - sample.needle.start
        room = 1024 - len(task.intro) - len(question) - len(answer) - size
        place = sample.needle.start - len(task.intro)
        # A sentence has 25 tokens at most.
        assert place == depth * room if depth in (0, 1) else abs(place - depth * room) <= 13
        assert place in (0, room) or sample.ids[sample.needle.start - 1] in stops


def test_needles_are_outside_the_last_segment_as_often_as_asked_for():
    """Then they end before the segment in which the question begins, so that only memory can answer; else in it."""

    def shares(probability: float) -> float:
        task = make_task("copy", outside_last_segment=probability)
        samples = [task.sample(random.Random(seed), 2 * SEGMENT) for seed in range(400)]
        return sum(sample.needle.stop <= SEGMENT for sample in samples) / 400

    assert shares(1) == 1 and shares(0) == 0
    assert abs(shares(0.85) - 0.85) < 0.055  # three deviations


def test_needles_are_cut_in_two_by_a_segments_end_as_often_as_asked_for():
    def share(probability: float, segments: int = 3) -> float:
        task = make_task("copy", num_tokens=20, across_segments=probability, outside_last_segment=1)
        length = segments * SEGMENT + 1 + 20  # the cue and the answer are in a segment of their own
        needles = [task.sample(random.Random(seed), length).needle for seed in range(400)]
        assert all(needle.stop <= segments * SEGMENT for needle in needles)
        return sum(needle.start // SEGMENT < (needle.stop - 1) // SEGMENT for needle in needles) / 400

    by_chance = share(0)
    assert 0 < by_chance < 0.5 and share(1) == 1
    assert abs(share(0.5) - (1 + by_chance) / 2) < 0.075  # three deviations
    assert share(1, segments=1) == 0  # there is no place for it


@pytest.mark.parametrize("name", ["passkey", "needle"])
def test_needles_are_absent_as_often_as_asked_for(name):
    """They are asked for all the same, and the sample is as long as others."""
    num_absent = 0
    for seed in range(400):
        (needle, *_), (question, answer) = make_task(name).draw(random.Random(seed))
        sample = make_task(name, absent=0.5).sample(random.Random(seed), 4 * SEGMENT)
        assert len(sample.ids) == 4 * SEGMENT and sample.ids[-len(question + answer) :] == question + answer
        if sample.ids[sample.needle] != needle:
            num_absent += 1
            assert sample.needle.start == sample.needle.stop
            assert TEXT.decode(needle) not in TEXT.decode(sample.ids)
    assert abs(num_absent / 400 - 0.5) < 0.075  # three deviations


def test_the_segment_that_counts_is_the_one_in_which_the_question_begins():
    """The cue is the last token of its segment here, so that the answer is in the next one."""
    task = make_task("copy", outside_last_segment=1, num_tokens=40)
    for seed in range(20):
        sample = task.sample(random.Random(seed), 2 * SEGMENT + 40)
        assert sample.answer.start == 2 * SEGMENT and sample.needle.stop <= SEGMENT


def test_a_sample_of_one_segment_has_its_needle_anywhere():
    task = make_task("copy", outside_last_segment=1)
    starts = {task.sample(random.Random(seed), SEGMENT).needle.start for seed in range(400)}
    assert starts == set(range(SEGMENT - 5 - 1 - 5 + 1))  # needle, cue and answer


def test_other_needles_have_other_keys():
    """Each key is there once, as a needle, and the one that is asked for is among them."""
    for values, seed in itertools.product(("numbers", "words", "uuids"), range(5)):
        task = Needle(TEXT, haystack=PROSE, values=values, num_needles=4)
        sample = task.sample(random.Random(seed), 1500)
        head, _, question = TEXT.decode(sample.ids).partition(" What is the special magic")
        needles = [part.partition(".")[0] for part in head.split(f"One of the special magic {values} for ")[1:]]
        pairs = dict(needle.split(" is: ") for needle in needles)
        assert len(pairs) == len(set(pairs.values())) == 4
        key = question.partition(" for ")[2].partition(" mentioned")[0]
        assert TEXT.decode(sample.ids[sample.answer]) == f" {pairs[key]}."
        assert f"for {key} is: {pairs[key]}." in TEXT.decode(sample.ids[sample.needle])


def test_several_questions_are_asked_one_after_another():
    """Each of another needle, and answered rightly; that of the needle which is asked for is the last one."""
    task = Needle(TEXT, haystack=PROSE, num_needles=4, num_questions=3)
    sample = task.sample(random.Random(0), 1500)
    head, *asked = TEXT.decode(sample.ids).split(" What is the special magic number for ")
    pairs = dict(part.partition(".")[0].split(" is: ") for part in head.split("special magic numbers for ")[1:])
    answers = [TEXT.decode(sample.ids[answer]) for answer in (*sample.earlier, sample.answer)]
    keys = [part.partition(" mentioned")[0] for part in asked]
    assert answers == [f" {pairs[key]}." for key in keys] and len(set(keys)) == 3 < len(pairs)
    assert all(part.endswith(answer) for part, answer in zip(asked, answers))
    assert f"for {keys[-1]} is:" in TEXT.decode(sample.ids[sample.needle])


def test_numbers_of_the_haystack_are_put_before_words_of_it():
    """Nothing else changes, and as many as were asked for."""
    text = PROSE.removesuffix(" ") * 40
    plain, task = Needle(TEXT, haystack=text), Needle(TEXT, haystack=text, haystack_numbers=0.2)
    before, after = TEXT.decode(plain.haystack), TEXT.decode(task.haystack)
    numbers = re.findall(r" ([0-9][0-9,]*)(?= [A-Za-z])", after)
    assert re.sub(r" [0-9][0-9,]*(?= [A-Za-z])", "", after) == before
    assert 0.15 < len(numbers) / len(before.split()) < 0.25
    assert {len(number.replace(",", "")) for number in numbers} == set(range(1, 8))
    assert any("," in number for number in numbers) and any(number.endswith("00") for number in numbers)
    assert task.haystack == Needle(TEXT, haystack=text, haystack_numbers=0.2).haystack


def test_some_numbers_have_few_digits():
    task, rng = Needle(TEXT, haystack=PROSE, few_digits=0.5), random.Random(0)
    kinds = [len(set(task.draw_value(rng))) for _ in range(400)]
    assert 0.4 < sum(kind <= 3 for kind in kinds) / len(kinds) < 0.6 and max(kinds) == 7
    assert all(len(task.draw_value(rng)) == 7 for _ in range(50))


def test_a_continued_sample_has_no_intro():
    for name in ("passkey", "needle"):
        task = TASKS[name](text_tokenizer(begin=True), segment_length=SEGMENT)
        whole, rest = (task.sample(random.Random(0), 512, continued=c).ids for c in (False, True))
        assert whole[: len(task.intro)] == task.intro and task.intro[0] == TEXT.bos_token_id
        assert TEXT.bos_token_id not in rest and "quiz" not in TEXT.decode(rest)


def test_prose_begins_at_another_sentence_in_each_sample():
    task = make_task("needle", haystack=PROSE)
    opening = {tuple(task.sample(random.Random(i), 512, depth=1, continued=True).ids[:8]) for i in range(50)}
    assert len(opening) == 4  # as many as PROSE has sentences
    assert {TEXT.decode(ids)[:3] for ids in opening} == {" It", " No", " Wa", " Th"}


def test_the_haystack_is_tokenised_once():
    lengths = []
    task = make_task("passkey")
    tokenizer = task.tokenizer
    task.tokenizer = lambda text, **options: lengths.append(len(text)) or tokenizer(text, **options)
    task.sample(random.Random(0), 100_000)
    assert sum(lengths) < 200


def test_filler_is_haystack_after_the_intro():
    for name in ("passkey", "needle"):
        task = make_task(name)
        start, later = (task.filler(random.Random(0), 2 * SEGMENT, start=start) for start in (True, False))
        assert len(start) == len(later) == 2 * SEGMENT
        assert start[: len(task.intro)] == task.intro
        assert "quiz" not in TEXT.decode(later) and TEXT.decode(later).count("grass is") >= 2
        assert task.filler(random.Random(0), 10, start=True) == task.intro[:10]


def test_copy_needs_no_tokenizer():
    sample = Copy(vocab_size=6, num_tokens=4).sample(random.Random(0), 20)
    content, (cue, *answer) = sample.ids[sample.needle], sample.ids[-5:]
    assert content == answer == sample.ids[sample.answer] and cue == 1 and set(content) <= {2, 3, 4, 5}
    assert sample.ids.count(0) == 11


def test_copy_uses_no_special_token_of_a_tokenizer():
    assert not set(make_task("copy", num_tokens=400).sample(random.Random(0), 1000).ids) & set(TEXT.all_special_ids)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Passkey(TEXT, digits=0), "digits is 0: give at least 1"),
        (lambda: Passkey(TEXT, outside_last_segment=2), "outside_last_segment is 2: give a probability"),
        (lambda: Passkey(TEXT, across_segments=-1), "across_segments is -1: give a probability"),
        (lambda: Needle(TEXT, absent=2), "absent is 2: give a probability"),
        (lambda: Needle(TEXT, values="colors"), "values is 'colors': choose one of numbers, words, uuids"),
        (lambda: Needle(TEXT, num_needles=0), "num_needles is 0: give 1 to"),
        (lambda: Needle(TEXT, num_needles=2, num_questions=3), "num_questions is 3: give 1 to num_needles"),
        (lambda: Needle(TEXT, haystack_numbers=1.5), "haystack_numbers is 1.5: give a share, from 0 to 1"),
        (lambda: Needle(TEXT, few_digits=-1), "few_digits is -1: give a share, from 0 to 1"),
        (lambda: Needle(TEXT, haystack=[]), "haystack is empty: give prose"),
        (lambda: Copy(), "tokenizer and vocab_size are missing: give one"),
        (lambda: Copy(vocab_size=2), "vocab_size is 2: .* at least 3"),
        (lambda: Copy(vocab_size=9, num_tokens=0), "num_tokens is 0: give at least 1"),
        (lambda: Copy(vocab_size=9).sample(random.Random(0), 10), "length 10 is too short .* take 11 tokens: give"),
        (lambda: Copy(vocab_size=9).sample(random.Random(0), 20, depth=1.1), "depth is 1.1: give a number from 0"),
    ],
)
def test_bad_options_of_tasks_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# Texts


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(1, 9), st.booleans(), st.integers(0, 9))
@settings(max_examples=30)
def test_every_token_of_an_epoch_is_there_once_and_in_order(lengths, length, streaming, seed):
    """So is every target, except the first token of each piece; documents of fewer than two tokens are left out."""
    documents = numbered(*lengths)
    long_enough = [[*document, END] for document in documents if len(document) >= 2]
    if not long_enough:
        return
    total = sum(map(len, long_enough))
    with tempfile.TemporaryDirectory() as folder:
        spec = {"source": str(write_jsonl(Path(folder, "a.jsonl"), documents)), "streaming": streaming}
        mixture = numbers_mixture(spec, segment=length, seed=seed)
        batches = [mixture.next(1, length) for _ in range(-(-2 * total // length))]
        assert mixture.skipped_documents[spec["source"]] >= len(documents) - len(long_enough)
    ids, positions, labels = (
        torch.cat([getattr(batch, field)[0] for batch in batches]).tolist()
        for field in ("input_ids", "position_ids", "labels")
    )
    for epoch in (ids[:total], ids[total : 2 * total]):
        ends = [i + 1 for i, token in enumerate(epoch) if token == END]
        found = [epoch[start:end] for start, end in zip([0, *ends], ends)]
        assert sorted(found) == sorted(long_enough)
        assert found == long_enough or not streaming
    for i, position in enumerate(positions):
        is_first = i % length == 0 or ids[i - 1] == END
        assert position == (0 if is_first else positions[i - 1] + 1)
        assert labels[i] == (-100 if is_first else ids[i])


def test_each_epoch_seed_and_use_has_an_order_of_its_own(tmp_path):
    source = str(write_jsonl(tmp_path / "a.jsonl", numbered(*[3] * 30)))
    mixture = numbers_mixture(source)
    orders = [stream(mixture, 120)[::4] for _ in range(3)] + [stream(numbers_mixture(source, seed=1), 120)[::4]]
    orders.append(mixture.filler(source, 120, start=True)[0].tolist()[::4])
    assert len(set(map(tuple, orders))) == 5 and all(sorted(order) == sorted(orders[0]) for order in orders)


def test_text_files_come_as_they_are(tmp_path):
    """White space, empty lines and non-ASCII letters included; only a byte-order mark goes, and a line ends in \\n."""
    text = "  One\n\n\ntwo \t\n é 日\x0c\u2028\n\nend\n\n"
    tokens = len(TEXT(text)["input_ids"]) + 1
    plain, marked = tmp_path / "plain.txt", tmp_path / "marked.txt"
    plain.write_bytes(text.encode())
    marked.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    with gzip.open(tmp_path / "packed.txt.gz", "wt", encoding="utf-8") as file:
        file.write(text)
    for name, streaming in itertools.product(("plain.txt", "marked.txt", "packed.txt.gz"), (False, True)):
        mixture = Mixture([{"source": str(tmp_path / name), "streaming": streaming}], TEXT, 1, 0)
        assert decoded_text(mixture, tokens) == text + "<end>", (name, streaming)


def test_all_kinds_of_files_are_read_the_same(tmp_path):
    texts = {"text": ["one, two\nthree", '"four"', "five six"]}
    table = datasets.Dataset.from_dict({"number": [1, 2, 3], **texts})
    (tmp_path / "txt").mkdir()
    for index, text in enumerate(texts["text"]):
        (tmp_path / "txt" / f"{index}.txt").write_text(text)
    table.to_csv(tmp_path / "a.csv")
    table.to_json(tmp_path / "a.jsonl")
    table.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(table.to_list()))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    tokens = sum(len(TEXT(text)["input_ids"]) + 1 for text in texts["text"])
    for name in ("txt", "a.csv", "a.jsonl", "a.parquet", "a.json", "b.jsonl.gz"):
        mixture = Mixture([{"source": str(tmp_path / name), "streaming": True}], TEXT, 1, 0)
        assert decoded_text(mixture, tokens) == "".join(f"{text}<end>" for text in texts["text"]), name


def test_a_folder_is_the_files_in_it_and_in_its_folders(tmp_path):
    inner = tmp_path / "shelf" / "deep" / "deeper"
    inner.mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for path, text in ((tmp_path / "shelf" / "a.txt", "1 2"), (inner / "b.txt", "3 4"), (inner / "c.txt", "5 6")):
        path.write_text(text)
    (tmp_path / ".hidden" / "no.txt").write_text("7 8")
    (tmp_path / "README.md").write_text("9 9")
    assert sorted(stream(numbers_mixture(str(tmp_path)), 9)) == [1, 2, 3, 4, 5, 6, END, END, END]
    assert sorted(stream(numbers_mixture(str(tmp_path / "shelf" / "*.txt")), 3)) == [1, 2, END]
    assert sorted(stream(numbers_mixture(str(tmp_path / "**" / "[bc].txt")), 6)) == [3, 4, 5, 6, END, END]


def test_documents_begin_and_end_as_the_tokenizer_has_it(tmp_path):
    (tmp_path / "a.txt").write_text("It was late.")
    tokenizer = text_tokenizer(begin=True)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = TEXT("It was late.")["input_ids"]
    assert stream(Mixture([str(tmp_path)], tokenizer, 1, 0), len(ids) + 3, 1) == [begin, *ids, end, begin]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=TEXT.backend_tokenizer)
    assert stream(Mixture([str(tmp_path)], tokenizer, 1, 0), len(ids) + 1, 1) == [*ids, ids[0]]


def test_a_document_is_tokenised_once_however_many_rows_it_fills(tmp_path, monkeypatch):
    mixture = numbers_mixture(str(write_jsonl(tmp_path / "a.jsonl", numbered(400, 400))))
    calls = []
    original = PreTrainedTokenizerFast.__call__
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", lambda *a, **k: calls.append(1) or original(*a, **k))
    for _ in range(79):
        mixture.next(1, 10)
    assert len(calls) == 2


def test_short_documents_are_left_out_and_counted(tmp_path):
    source = str(write_jsonl(tmp_path / "a.jsonl", numbered(0, 5, 1, 4, 1)))
    mixture = numbers_mixture({"source": source, "name": "mine"}, segment=1)
    for _ in range(2):
        assert sorted(stream(mixture, 11, 1)) == [0, 1, 2, 3, 4, 6, 7, 8, 9, END, END]
    # Those that open or end an epoch are counted when the next document is looked for.
    assert 3 <= mixture.skipped_documents["mine"] <= 6
    mixture = numbers_mixture({"source": source, "name": "mine", "min_tokens": 5})
    assert stream(mixture, 6) == [0, 1, 2, 3, 4, END]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_text_of_short_documents_alone_is_refused(tmp_path, streaming):
    """It is not looked through forever for a longer one, at its first epoch or at any later one."""
    source = str(write_jsonl(tmp_path / "a.jsonl", numbered(1, 0, 1)))
    with pytest.raises(ValueError, match="has no document of at least 2 tokens in its column 'text': name another"):
        numbers_mixture({"source": source, "streaming": streaming}).next(1, 2)


# Mixtures


def test_a_target_of_a_text_counts_as_much_as_any_other(tmp_path):
    batch = numbers_mixture(str(write_jsonl(tmp_path / "a.jsonl", numbered(3, 9, 14))), segment=8).next(3, 8)
    assert batch.loss_weights.dtype == torch.float32 and batch.input_ids.shape == (3, 8)
    expected = torch.where(batch.labels == -100, 0.0, 1 / 7)
    torch.testing.assert_close(batch.loss_weights, expected)


@pytest.mark.parametrize("context_loss", [0, 0.1])
def test_the_answer_of_a_task_counts_one_and_its_context_what_was_asked_for(context_loss):
    spec = {"task": "passkey", "context_loss": context_loss}
    batch = Mixture([spec], TEXT, SEGMENT, 0).next(2, 4 * SEGMENT)
    answer = 5 + 2  # a space, five digits, a full stop
    is_target, weights = batch.labels != -100, batch.loss_weights
    assert torch.equal(batch.labels[is_target], batch.input_ids[is_target])
    assert is_target.sum(1).tolist() == [answer if context_loss == 0 else 4 * SEGMENT - 1] * 2
    torch.testing.assert_close(weights[:, -answer:], torch.full((2, answer), 1 / answer))
    torch.testing.assert_close(weights.sum(1), torch.full((2,), 1.0 + context_loss))
    assert not weights[~is_target].any() and weights[:, 1:-answer].unique().numel() == 1


def test_several_answers_share_what_one_would_count(tmp_path):
    """Their tokens count the same, and what is between them is no target."""
    prose = str(write_jsonl(tmp_path / "prose.jsonl", [{"text": PROSE}]))
    spec = {"task": "needle", "haystack": prose, "num_needles": 3, "num_questions": 2, "context_loss": 0}
    batch = Mixture([spec], TEXT, SEGMENT, 0).next(1, 16 * SEGMENT)
    tokens = 2 * (7 + 2)  # a space, seven digits, a full stop
    targets = (batch.labels[0] != -100).nonzero().flatten()
    assert len(targets) == tokens and int(targets.diff().max()) > 1
    torch.testing.assert_close(batch.loss_weights[0, targets], torch.full((tokens,), 1 / tokens))


def test_sources_are_drawn_by_their_weights(tmp_path):
    source = str(write_jsonl(tmp_path / "a.jsonl", numbered(50)))
    mixture = numbers_mixture({"source": source, "weight": 3, "name": "text"}, {"task": "copy"}, segment=20)
    names = [mixture.next(1, 20).source for _ in range(400)]
    assert abs(names.count("text") / 400 - 0.75) < 0.065  # three deviations
    assert set(names) == {"text", "copy"}


def make_specs(folder: Path) -> list[dict]:
    """All kinds of sources."""
    write_jsonl(folder / "a.jsonl", numbered(3, 1, 40, 11, 0, 120))
    write_jsonl(folder / "b.jsonl", numbered(33, 44, 2))
    prose = {"source": str(folder / "a.jsonl")}
    return [
        {"source": str(folder / "a.jsonl"), "name": "map"},
        {"source": str(folder / "*.jsonl"), "name": "stream", "streaming": True},
        {"source": str(folder / "b.jsonl"), "name": "long", "min_tokens": 34},
        {"task": "copy", "num_tokens": 3},
        {"task": "copy", "name": "copy2", "context_loss": 0},
        {"task": "needle", "haystack": prose, "context_loss": 0},
    ]


def mixed(folder: Path, seed: int = 0) -> Mixture:
    return Mixture(make_specs(folder), TEXT, 8, seed)


def draw(mixture: Mixture, count: int) -> list[Batch | torch.Tensor]:
    """Batches, with text for memories in between."""
    names = itertools.cycle(mixture.sources)
    made = []
    for i in range(count):
        made.append(mixture.next(1 + i % 2, 280 if i % 3 else 304, continued=i % 5 == 0))
        made.append(mixture.filler(next(names), 16, start=i % 4 == 0))
    return made


def agree(left: list, right: list) -> bool:
    return all(same(a, b) if isinstance(a, Batch) else torch.equal(a, b) for a, b in zip(left, right))


def test_the_seed_decides_everything(tmp_path):
    first, second = draw(mixed(tmp_path), 20), draw(mixed(tmp_path), 20)
    assert agree(first, second) and not agree(first, draw(mixed(tmp_path, seed=1), 20))
    assert {batch.source for batch in first[::2]} == {"map", "stream", "long", "copy", "copy2", "needle"}


@pytest.mark.parametrize("done", [0, 1, 2, 5, 17, 30])
def test_a_loaded_state_goes_on_exactly_where_it_was_saved(tmp_path, done):
    """In the middle of documents, across epochs, while streaming; through JSON, twice in a row."""
    mixture = mixed(tmp_path)
    draw(mixture, done)
    state = json.loads(json.dumps(mixture.state_dict()))
    resumed, kept = mixed(tmp_path), json.dumps(state)
    draw(resumed, 3)  # what a mixture did before it loads does not matter
    resumed.load_state_dict(state)
    again = mixed(tmp_path)
    again.load_state_dict(json.loads(json.dumps(resumed.state_dict())))
    expected = draw(mixture, 25)
    assert agree(expected, draw(resumed, 25)) and agree(expected, draw(again, 25))
    assert without_place(resumed.state_dict()) == without_place(mixture.state_dict())
    assert resumed.skipped_documents == mixture.skipped_documents
    assert json.dumps(state) == kept
    ends = [mixed(tmp_path), mixed(tmp_path)]
    for end, before in zip(ends, (mixture, resumed)):
        end.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert agree(draw(ends[0], 10), draw(ends[1], 10))


def without_place(state: dict) -> dict:
    """Datasets tells one place of a stream in several ways, by where its iterator began."""
    sources = copy.deepcopy(state["sources"])
    for source in sources.values():
        for stream in source.values():
            if isinstance(stream, dict):
                del stream["place"]
    return state | {"sources": sources}


@pytest.mark.parametrize("streaming", [False, True])
def test_every_token_of_a_text_is_a_place_to_stop_at(tmp_path, streaming):
    """Also the end of a document, of an epoch, and of a file."""
    for name, lengths in (("a", (3, 1, 4)), ("b", (2, 5, 0))):
        write_jsonl(tmp_path / f"{name}.jsonl", numbered(*lengths))
    spec = {"source": str(tmp_path), "streaming": streaming}
    mixture = numbers_mixture(spec, segment=1)
    whole = stream(numbers_mixture(spec, segment=1), 80, 1)
    for done in range(50):
        resumed = numbers_mixture(spec, segment=1)
        resumed.load_state_dict(json.loads(json.dumps(mixture.state_dict())))
        assert stream(resumed, 30, 1) == whole[done : done + 30], done
        mixture.next(1, 1)


def test_text_for_memories_has_a_place_of_its_own(tmp_path):
    """Reading it changes no batch, and neither do batches change it."""
    source = str(write_jsonl(tmp_path / "a.jsonl", numbered(30, 50, 70)))
    alone, with_fillers, fillers_alone = (numbers_mixture({"source": source, "name": "a"}) for _ in range(3))
    expected = [alone.next(1, 10) for _ in range(20)]
    fillers = []
    for batch in expected:
        fillers.append(with_fillers.filler("a", 4, start=False))
        assert same(with_fillers.next(1, 10), batch)
    assert agree(fillers, [fillers_alone.filler("a", 4, start=False) for _ in fillers])


def test_continued_rows_of_a_text_come_after_what_its_memory_read(tmp_path):
    """One after another, in the same document, which is left where it has too few tokens for memory and batch."""
    source = str(write_jsonl(tmp_path / "a.jsonl", numbered(90, 90)))
    mixture = numbers_mixture({"source": source, "name": "a"})
    assert mixture.document("a") is None
    for _ in range(3):
        read, documents = [], set()
        for index in range(3):
            (text,) = mixture.filler("a", 8, start=index == 0, ahead=20).tolist()
            documents.add(mixture.document("a"))
            rows = mixture.next(2, 10, source="a", continued=True).input_ids.tolist()
            read += [*text, *rows[0], *rows[1]]
        assert read == list(range(read[0], read[0] + 84)) and read[0] % 90 == 0 and len(documents) == 1
        assert mixture.document("a", room=7) in documents and mixture.document("a", room=8) is None


def test_text_for_memories_stays_in_a_document_that_has_enough_left(tmp_path):
    source = str(write_jsonl(tmp_path / "a.jsonl", numbered(11, 11, 11)))
    mixture = numbers_mixture({"source": source, "name": "a"})
    firsts = []
    for _ in range(6):
        (first,), (second,) = mixture.filler("a", 6, start=True).tolist(), mixture.filler("a", 6, start=False).tolist()
        assert (first + second)[:11] == list(range(first[0], first[0] + 11)) and second[-1] == END
        firsts.append(first[0])
    assert sorted(firsts[:3]) == sorted(firsts[3:]) == [0, 11, 22]
    # 8 of 12 tokens are read, and 4 are too few for the next call, which goes on to another document.
    openings = [mixture.filler("a", 8, start=False)[0, 0].item() for _ in range(3)]
    assert sorted(openings) == [0, 11, 22]
    # Documents that are too short are read together.
    for seed in range(5):
        (ids,) = numbers_mixture({"source": source, "name": "a"}, seed=seed).filler("a", 36, start=False).tolist()
        assert sorted(ids) == [*range(33), END, END, END]


def test_a_task_fills_memories_with_its_haystack_and_continues_them():
    mixture = Mixture([{"task": "passkey"}], TEXT, SEGMENT, 0)
    start, later = (TEXT.decode(mixture.filler("passkey", 4 * SEGMENT, start=s)[0]) for s in (True, False))
    assert start.startswith(INTRO) and "quiz" not in later and "pass key" not in start + later
    batch = mixture.next(1, 4 * SEGMENT, continued=True)
    assert "quiz" not in TEXT.decode(batch.input_ids[0]) and batch.position_ids[0, 0] == 0


def test_the_prose_of_needles_is_a_text(tmp_path):
    (tmp_path / "prose.txt").write_text(PROSE)
    for haystack in (str(tmp_path), {"source": str(tmp_path / "prose.txt"), "streaming": True}):
        batch = Mixture([{"task": "needle", "haystack": haystack}], TEXT, SEGMENT, 0).next(1, 512)
        assert "Nobody came!" in TEXT.decode(batch.input_ids[0]) and TEXT.eos_token_id not in batch.input_ids


# What is refused


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"weight": 1}, "source and task of .*: give one of these two fields"),
        ({"source": "x.txt", "task": "copy"}, "source and task of .*: give one"),
        (3, "3 is no source: give a dict of fields, or a string"),
        ({"source": "good.jsonl", "weight": 0}, "weight of 'good.jsonl' is 0: give a number above 0"),
        ({"source": "good.jsonl", "weight": "1"}, "weight of 'good.jsonl' is '1': give a number above 0"),
        ({"source": "good.jsonl", "weight": float("nan")}, "weight of 'good.jsonl' is nan: give"),
        ({"source": "good.jsonl", "min_tokens": -1}, "min_tokens of 'good.jsonl' is -1: give"),
        ({"source": "good.jsonl", "wieght": 1}, "field 'wieght' of 'good.jsonl' is unknown: choose among .*weight"),
        ({"source": "good.jsonl", "digits": 1}, "field 'digits' of 'good.jsonl' is unknown"),
        ({"source": "good.jsonl", "split": "test"}, "'good.jsonl' cannot be read .*test.*: check its files and split"),
        ({"source": "good.jsonl", "column": "body"}, "no column 'body': choose `column` among text"),
        (
            {"source": "good.jsonl", "column": "body", "streaming": True},
            "no column 'body': choose `column` among text",
        ),
        ({"source": "numbers.jsonl"}, "document 0 of source 'numbers.jsonl' is no string but int .*: name another"),
        ({"source": "null.jsonl", "streaming": True}, "document 1 of source 'null.jsonl' is no string but NoneType"),
        ({"source": "absent.txt"}, "'absent.txt' does not exist: name a file, a folder, a glob, or a Hub id"),
        ({"source": "./absent"}, "'./absent' does not exist"),
        ({"source": "absent/*.txt"}, "does not exist"),
        ({"source": "nobody/nothing"}, "'nobody/nothing' cannot be read .*: it is not here, so check the Hub id"),
        ({"source": "nobody/nothing", "streaming": True}, "'nobody/nothing' cannot be read .*: it is not here"),
        ({"source": "bare"}, "'bare' has no .txt, .jsonl, .json, .csv, .parquet file: give some"),
        ({"source": "picture.png"}, "'picture.png' has no .txt, .jsonl, .json, .csv, .parquet file: give some"),
        ({"source": "both"}, r"'both' has files of several kinds \(csv, text\): name those of one kind"),
        ({"source": "empty.txt"}, "'empty.txt' is empty: give a text with words in it"),
        ({"source": "empty.jsonl"}, "'empty.jsonl' is empty"),
        ({"source": "latin.txt"}, "'latin.txt' cannot be read .*utf-8.*: check its files"),
        ({"source": "latin.txt", "streaming": True}, "'latin.txt' cannot be read .*utf-8.*: check its files"),
        ({"source": "broken.jsonl"}, "'broken.jsonl' cannot be read .*: check its files"),
        ({"task": "riddle"}, "task 'riddle' is unknown: choose one of passkey, needle, babilong, copy"),
        (
            {"task": "copy", "digits": 3},
            "field 'digits' of 'copy' is unknown: choose among across_segments, context_loss",
        ),
        ({"task": "copy", "num_tokens": 0}, "source 'copy': num_tokens is 0: give at least 1"),
        ({"task": "copy", "num_tokens": "3"}, "source 'copy': "),
        ({"task": "copy", "context_loss": -1}, "context_loss of 'copy' is -1: give a number of at least 0"),
        (
            {"task": "needle", "haystack": {"source": "good.jsonl", "weight": 2}},
            "'weight' of 'needle/haystack' is unk",
        ),
        ({"task": "needle", "haystack": {"column": "text"}}, "source of 'needle/haystack' is missing: name a text"),
    ],
)
def test_bad_sources_are_refused(tmp_path, monkeypatch, spec, message):
    """Field, value and remedy; when they are read first, at the latest."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "good.jsonl", numbered(9))
    (tmp_path / "numbers.jsonl").write_text('{"text": 1}\n')
    (tmp_path / "null.jsonl").write_text('{"text": "1 2"}\n{"text": null}\n')
    for name in ("bare", "both"):
        (tmp_path / name).mkdir()
    for name in ("both/a.txt", "both/b.csv", "picture.png", "bare/.hidden.txt"):
        (tmp_path / name).write_text("text\n1 2 3\n")
    for name in ("empty.txt", "empty.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 noir")
    (tmp_path / "broken.jsonl").write_text('{"text": "1 2"\n')
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        numbers_mixture(spec).next(1, 10)


def test_a_batch_that_cannot_be_is_refused(tmp_path):
    mixture = numbers_mixture({"task": "copy"}, segment=5)
    for length in (0, -5, 7):
        with pytest.raises(ValueError, match=f"length is {length}: give a positive multiple of the segment length 5"):
            mixture.next(1, length)
    with pytest.raises(ValueError, match="num_rows is 0: give at least 1"):
        mixture.next(0, 5)
    with pytest.raises(ValueError, match="length 5 is too short for Copy"):
        mixture.next(1, 5)
    with pytest.raises(ValueError, match="source 'passkey' is not one of copy: name one of them"):
        mixture.filler("passkey", 5, start=True)
    with pytest.raises(ValueError, match="there are no sources: give at least one"):
        numbers_mixture()
    with pytest.raises(ValueError, match="name 'copy' is there twice: give each source a `name` of its own"):
        numbers_mixture({"task": "copy"}, {"task": "copy"})
    with pytest.raises(ValueError, match="the state is of the sources copy, not of other: give the sources"):
        numbers_mixture({"task": "copy", "name": "other"}).load_state_dict(mixture.state_dict())


def test_an_option_without_effect_is_warned_of(tmp_path):
    source = str(write_jsonl(tmp_path / "a.jsonl", numbered(9)))
    with pytest.warns(UserWarning, match="config of source 'a' has no effect"):
        numbers_mixture({"source": source, "name": "a", "config": "en"})
