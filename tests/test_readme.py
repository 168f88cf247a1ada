"""README, docs and API reference tell the truth: commands and Python run, on a tiny Llama instead of SmolLM2, quoted code is
in the source, links lead somewhere, and what is public has a docstring. No test needs another one to have run before."""

import argparse
import ast
import dataclasses
import functools
import importlib
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from test_scripts import TEXT, tiny_tokenizer
from tiny import base_llama, tiny_model

from infini_llama.hub_upload.__main__ import build_parser as hub_upload_parser
from infini_llama.scripts.training_options import TrainingOptions, parse_options

ROOT = Path(__file__).parent.parent
PAYLOAD = sorted(ROOT.glob("*_infini.py"))
PAGES = {path.relative_to(ROOT).as_posix(): path for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]}
PAGES = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
README, TRAINING = PAGES["README.md"], PAGES["docs/training.md"]
# A recipe's steps are too many for a test.
FEWER = "--max_steps 2 --batch_tokens 384 --sequence_length 384 --eval_length 384 --eval_sequences 1".split()
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
# A block of Python that begins so is quoted from there; all other blocks of a page are one session.
QUOTE = re.compile(r"# (\w+_infini)\.([\w.]+)\n")
# Their Python is for several processes, and for a model with a chat template: the tests named after them run it.
RUN_ELSEWHERE = {"docs/context_parallel.md", "docs/serving.md"}
# Methods that do what Transformers says of them.
AS_IN_TRANSFORMERS = {"get_max_length", "lazy_initialization", "offload", "prefetch", "reorder_cache", "reset"}


def blocks(language: str, text: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [body for name, body in fenced if name == language]


def commands(text: str) -> list[str]:
    """The lines of the bash blocks, continued ones joined."""
    return [line for block in blocks("bash", text) for line in block.replace("\\\n", " ").splitlines()]


def scripts(text: str) -> list[str]:
    return [line for line in commands(text) if line.startswith("python scripts/")]


def run(command: str, place: Path, *more: str) -> None:
    words = ["llama" if word == HUB_ID else word for word in shlex.split(command)[1:]]
    done = subprocess.run([sys.executable, *words, *more], cwd=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stderr}"


def run_python(page: str) -> dict:
    """What the blocks of Python leave behind, which are one session."""
    session: dict = {}
    with torch.enable_grad():  # and after it again what was before, whatever the page does
        for block in blocks("python", PAGES[page]):
            if not QUOTE.match(block):
                exec(compile(block, page, "exec"), session)
    return session


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a tiny Llama in place of the one on the Hub, and what the README's first command makes of it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("readme")
    (folder / "book.txt").write_text(TEXT, encoding="utf-8")
    for name in ("scripts", "models"):
        (folder / name).symlink_to(ROOT / name)
    tokenizer = tiny_tokenizer()
    base_llama(tiny_model(vocab_size=len(tokenizer), max_position_embeddings=4096)).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    command = scripts(README)[0]
    assert "convert.py" in command and HUB_ID in command
    run(command, folder)
    return folder


@pytest.fixture
def place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as the current folder."""
    monkeypatch.chdir(folder)
    return folder


def test_the_commands_of_the_readme_run_in_order(place: Path) -> None:
    """Read, ask, save, load, ask, train, evaluate: every script that the README shows, after the conversion."""
    (place / "book.safetensors").unlink(missing_ok=True)
    for command in scripts(README)[1:]:
        fewer = {"scripts/evaluate.py": ["--samples", "1"], "scripts/train.py": FEWER}
        run(command, place, *fewer.get(shlex.split(command)[1], []))
    assert (place / "book.safetensors").exists()
    assert (place / "passkey/model/config.json").exists()
    cells = json.loads((place / "results/results.json").read_text())["cells"]
    assert cells["passkey/16384/0"]["accuracy"] == {"memory": 1.0, "off": 0.0}


def test_the_python_of_the_readme_runs_in_order(place: Path) -> None:
    session = run_python("README.md")
    assert session["answer"].shape[1] > session["question"].shape[1]
    assert session["cache"].get_seq_length() == session["ids"].shape[1]


# TRL, PEFT and Trainer set what Transformers has renamed.
@pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning")
def test_the_training_guide_runs_in_order(place: Path) -> None:
    """Its Python is one session, its command is the README's, its options and recipes are those there are."""
    session = run_python("docs/training.md")
    assert session["loss"].isfinite() and session["adapted"].peft_config
    assert set(blocks("bash", TRAINING)) <= set(blocks("bash", README))
    recipes = {path.name for path in (ROOT / "scripts/recipes").glob("*.yaml")}
    assert set(re.findall(r"^\| `(\w+\.yaml)`", TRAINING, flags=re.MULTILINE)) == recipes
    assert set(re.findall(r"--(\w+)", TRAINING)) <= {f.name for f in dataclasses.fields(TrainingOptions)} | {
        "config_file",
        "help",
    }
    for block in blocks("yaml", TRAINING):
        assert set(yaml.safe_load(block)) <= {f.name for f in dataclasses.fields(TrainingOptions)}


@pytest.mark.parametrize("page", sorted(set(PAGES) - {"README.md", "docs/training.md"} - RUN_ELSEWHERE))
def test_the_python_of_every_other_page_runs_in_order(page: str, place: Path) -> None:
    """It asserts by itself what it shows."""
    run_python(page)


class Understood(Exception):
    """Raised where a script would begin to work."""


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_are_understood(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `python scripts/`, `python -m hub_upload` and `make` line of a bash block has options and targets that exist."""
    monkeypatch.chdir(ROOT)
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(*args, **kwargs):
        parse(*args, **kwargs)
        raise Understood

    for command in commands(PAGES[page]):
        command = command.removeprefix(".venv/bin/")
        words = shlex.split(command, comments=True)
        if words[:1] == ["make"]:
            if shutil.which("make") is None:
                pytest.skip("there is no make on this machine")
            done = subprocess.run(["make", "-n", *words[1:]], capture_output=True, text=True)
            assert done.returncode == 0, f"{command}\n{done.stderr}"
        elif words[:3] == ["python", "-m", "hub_upload"]:
            hub_upload_parser().parse_args(words[3:])
        elif words[:2] == ["python", "scripts/train.py"]:
            parse_options(words[2:])
        elif command.startswith("python scripts/"):
            script = importlib.import_module(f"infini_llama.scripts.{Path(words[1]).stem}")
            with monkeypatch.context() as patch, pytest.raises(Understood):
                patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
                script.main(words[2:])


def look_up(module: str, path: str) -> object:
    return functools.reduce(getattr, path.split("."), importlib.import_module(f"infini_llama.{module}"))


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_quotes_is_in_the_source(page: str) -> None:
    """Lines of quoted code are lines of what is named above them, in their order, with or without the comment at their end;
    names of ours exist.
    """
    quotes = [block for block in blocks("python", PAGES[page]) if QUOTE.match(block)]
    assert len(quotes) >= (10 if page == "docs/how_it_works.md" else 0)
    for block in quotes:
        source = iter(inspect.getsource(look_up(*QUOTE.match(block).groups())).splitlines())
        for quoted in map(str.strip, block.splitlines()[1:]):
            found = any(line.strip() == quoted or line.strip().startswith(f"{quoted}  #") for line in source)
            assert found, f"{quoted!r} is not in {block.splitlines()[0][2:]}, or not there"
    for module, path in re.findall(r"`(\w+_infini)\.([\w.]+)`", PAGES[page]):
        if path != "py":
            look_up(module, path)


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_somewhere(page: str) -> None:
    """To a file of this repository, and to a heading in it."""
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", prose):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), f"{page} links to {target}, which does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page} links to {target}#{anchor}, but there is no such heading"


# The API reference


@pytest.mark.parametrize("path", PAYLOAD, ids=lambda path: path.name)
def test_what_is_public_has_a_docstring(path: Path) -> None:
    """Every name in `__all__`, and every public method that its classes define here; a constant has it on the next line."""
    module = importlib.import_module(f"infini_llama.{path.stem}")
    body = ast.parse(path.read_text(encoding="utf-8")).body
    missing = []
    for name in module.__all__:
        thing = getattr(module, name)
        if not callable(thing):
            place = next(i for i, x in enumerate(body) if isinstance(x, ast.AnnAssign) and x.target.id == name)
            following = body[place + 1] if place + 1 < len(body) else None
            if not (isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)):
                missing.append(name)
            continue
        # `NamedTuple` and `dataclass` write a signature where there is no docstring.
        if not thing.__doc__ or thing.__doc__.startswith(f"{name}("):
            missing.append(name)
        for attribute, member in vars(thing).items() if inspect.isclass(thing) else ():
            function = getattr(member, "fget", None) or getattr(member, "__func__", member)
            function = inspect.unwrap(function) if callable(function) else None
            if inspect.isfunction(function) and Path(function.__code__.co_filename).name == path.name:
                public = not attribute.startswith("_") and attribute not in AS_IN_TRANSFORMERS
                if public and not function.__doc__:
                    missing.append(f"{name}.{attribute}")
    assert not missing


def test_the_api_reference_builds_without_warnings(tmp_path: Path) -> None:
    """What `make docs` runs has a page for each module, with all of its public names, and knows the sections in it."""
    pytest.importorskip("pdoc", reason="pdoc, of the extra `docs`, is not installed")
    if shutil.which("make") is None:
        pytest.skip("there is no make on this machine")
    recipe = subprocess.run(["make", "-n", "docs"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (command,) = [line for line in recipe.splitlines() if "-m pdoc" in line]
    words = [str(tmp_path) if word == "build/docs" else word for word in shlex.split(command)[1:]]
    assert str(tmp_path) in words
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and "Warn" not in done.stderr, done.stderr
    documented = [word for word in words if word.startswith("infini_llama.")]
    assert {f"infini_llama.{path.stem}" for path in PAYLOAD} < set(documented)
    for name in documented:
        page = (tmp_path / name.replace(".", "/")).with_suffix(".html").read_text(encoding="utf-8")
        public = getattr(importlib.import_module(name), "__all__", [])
        assert not [x for x in public if f'id="{x}"' not in page]
        # A section of another name would be one paragraph, whatever the lines in it.
        assert set(re.findall(r"<h6[^>]*>(.*?):</h6>", page)) <= {"Arguments", "Attributes", "Raises", "Returns"}
