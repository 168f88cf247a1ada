"""A model folder behind `pipeline("text-generation")` and `transformers serve`: they answer what `generate()` does."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, pipeline
from transformers.utils.import_utils import is_serve_available

PAGE = (Path(__file__).parent.parent / "docs/serving.md").read_text(encoding="utf-8")
N = 5  # the segment length of the tiny model
NEW_TOKENS = 2 * N + 3  # over two boundaries, wherever the prompt ends
LETTERS = "_abcdefghijklmnopqrstuvwxyzABCD"
# "A" opens what a user says, "B" what the model says.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ 'A' if m['role'] == 'user' else 'B' }}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}B{% endif %}"
)
# Two turns, the second of which goes on many segments later.
TURNS = ["hello", "tellmeabout" + "thelongtext" * 12]
needs_serving = pytest.mark.skipif(not is_serve_available(), reason="the extra `serving` is not installed")

Messages = list[dict[str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model and a tokenizer of letters, which decodes a stream piece by piece to the same text as at once."""
    tokenizer = Tokenizer(WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="_"))
    tokenizer.pre_tokenizer, tokenizer.decoder = Split(Regex("."), "isolated"), Fuse()
    folder = tmp_path_factory.mktemp("serving") / "infini"
    torch.manual_seed(0)
    tiny_model().save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="_", unk_token="_", chat_template=CHAT_TEMPLATE
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def generated(folder: Path) -> Callable[[Messages | str], str]:
    """What `generate()` says, alone, to a conversation or a text."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()

    def generated(prompt: Messages | str) -> str:
        if not isinstance(prompt, str):
            prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        new = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
        return tokenizer.decode(new, skip_special_tokens=True)

    return generated


def conversation(generated: Callable[[Messages | str], str]) -> Iterator[tuple[Messages, str]]:
    """What is said before each answer, and the answer."""
    messages = []
    for turn in TURNS:
        messages.append({"role": "user", "content": turn})
        answer = generated(messages)
        yield list(messages), answer
        messages.append({"role": "assistant", "content": answer})


def test_a_pipeline_on_a_folder_says_what_generate_does(folder: Path, generated) -> None:
    """Texts and chats, alone and as a padded batch, across boundaries."""
    pipe = pipeline("text-generation", model=str(folder), trust_remote_code=True, device="cpu")
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_full_text": False}
    for prompts in (TURNS, [messages for messages, _ in conversation(generated)]):
        expected = [generated(prompt) for prompt in prompts]
        assert len(set(expected)) == len(prompts), "answers that do not depend on the prompt would hide errors"
        assert [pipe(prompt, **settings)[0]["generated_text"] for prompt in prompts] == expected
        assert [answer[0]["generated_text"] for answer in pipe(prompts, batch_size=2, **settings)] == expected


# The server


@contextmanager
def served(folder: Path, home: Path, *options: str) -> Iterator[tuple[str, Path]]:
    """The address of a server, started as docs/serving.md says, and its log. It ends with the `with` block."""
    (command,) = re.findall(r"^python -c (?:.|\\\n)*? serve .*$", PAGE, flags=re.MULTILINE)
    words = shlex.split(command.replace("\\\n", " "))
    assert words.count("infini-smollm2") == 1
    words = [sys.executable, *(str(folder) if word == "infini-smollm2" else word for word in words[1:])]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home.mkdir()
    address, log = f"http://127.0.0.1:{port}", home / "log"
    environment = os.environ | {"HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules")}
    words += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", *options]
    with log.open("w") as out:
        server = subprocess.Popen(words, cwd=home, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 180
        while True:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
            except OSError:  # not yet
                time.sleep(0.2)
        yield f"{address}/v1", log
    finally:
        server.terminate()
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def client(url: str):
    import openai

    # Transformers' server closes a connection on which a request has failed.
    return openai.OpenAI(base_url=url, api_key="none", timeout=120, max_retries=2)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    with served(folder, tmp_path_factory.mktemp("server") / "home") as server:
        yield server


@needs_serving
@pytest.mark.slow
def test_the_server_says_what_generate_does(folder: Path, server, generated) -> None:
    """Chat completions and responses, at once and as streams, over two turns, and text completions."""
    api, model = client(server[0]), str(folder)
    chat, responses = {"model": model, "temperature": 0, "max_tokens": NEW_TOKENS}, {"model": model, "temperature": 0}
    responses["max_output_tokens"] = NEW_TOKENS
    for messages, expected in conversation(generated):
        completion = api.chat.completions.create(messages=messages, **chat)
        assert completion.choices[0].message.content == expected
        assert completion.usage.prompt_tokens == sum(1 + len(message["content"]) for message in messages) + 1
        chunks = api.chat.completions.create(messages=messages, stream=True, **chat)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
        assert api.responses.create(input=messages, stream=False, **responses).output_text == expected
        events = api.responses.create(input=messages, stream=True, **responses)
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == expected
    assert api.completions.create(prompt=TURNS[1], **chat).choices[0].text == generated(TURNS[1])


@needs_serving
@pytest.mark.slow
def test_conversations_side_by_side_do_not_mix(folder: Path, server, generated) -> None:
    """Each has its own memory, also beside and after a stream that its reader has left."""
    api = client(server[0])
    chats = [[{"role": "user", "content": letter * length}] for letter, length in zip("abcd", (3, 40, 11, 26))]
    expected, answers = [generated(chat) for chat in chats], {}
    settings = {"model": str(folder), "temperature": 0}
    left = api.chat.completions.create(messages=chats[0], max_tokens=400, stream=True, **settings)
    next(iter(left))
    left.close()

    def ask(i: int) -> None:
        answer = api.chat.completions.create(messages=chats[i], max_tokens=NEW_TOKENS, **settings)
        answers[i] = answer.choices[0].message.content

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(chats))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers.get(i) for i in range(len(chats))] == expected


REFUSED = {
    "static": ({"cache_implementation": "static"}, "`cache_implementation='static'` cannot hold a compressive memory"),
    "assisted": ({"prompt_lookup_num_tokens": 3}, "assisted generation is not supported with stateful models"),
}


@needs_serving
@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_the_model_refuses_is_an_error_and_the_next_request_works(folder: Path, server, generated, case) -> None:
    """The reason is in the log, and the server goes on."""
    import openai

    (url, log), (config, message) = server, REFUSED[case]
    chat = {"model": str(folder), "messages": [{"role": "user", "content": "abc"}], "temperature": 0}
    with pytest.raises(openai.InternalServerError):
        refused = {"generation_config": json.dumps(config | {"max_new_tokens": 3})}
        client(url).chat.completions.create(**chat, extra_body=refused)
    assert message in log.read_text()
    answer = client(url).chat.completions.create(**chat, max_tokens=NEW_TOKENS)
    assert answer.choices[0].message.content == generated(chat["messages"])


@needs_serving
@pytest.mark.slow
def test_continuous_batching_is_refused(folder: Path, tmp_path: Path) -> None:
    """Its pages hold keys and values and no memory: no answer is given, and the log says why."""
    import openai

    with served(folder, tmp_path / "home", "--continuous-batching") as (url, log):
        with pytest.raises(openai.InternalServerError):
            client(url).chat.completions.create(model=str(folder), messages=[{"role": "user", "content": "abc"}])
        assert "Continuous batching pages keys and values, and cannot hold a compressive memory" in log.read_text()


@needs_serving
def test_transformers_serve_alone_finds_no_class_that_came_with_a_folder(folder: Path) -> None:
    """Why docs/serving.md starts it in another way. When this fails, `transformers serve` may do as it is."""
    from transformers.cli.serving.model_manager import ModelManager

    with pytest.raises(AttributeError, match="has no attribute InfiniLlamaForCausalLM"):
        ModelManager(device="cpu", trust_remote_code=True, force_model=str(folder))
