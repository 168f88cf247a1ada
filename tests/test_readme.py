"""README and docs tell the truth: their commands and Python run, in order, on a tiny Llama instead of SmolLM2."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from test_scripts import TEXT, tiny_tokenizer
from tiny import base_llama, tiny_model

from infini_llama.scripts.training_options import TrainingOptions

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAINING = (ROOT / "docs/training.md").read_text(encoding="utf-8")
# A recipe's steps are too many for a test.
FEWER = "--max_steps 2 --batch_tokens 384 --sequence_length 384 --eval_length 384 --eval_sequences 1".split()
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, and a tiny Llama in place of the one on the Hub."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("readme")
    (place / "book.txt").write_text(TEXT, encoding="utf-8")
    tokenizer = tiny_tokenizer()
    base_llama(tiny_model(vocab_size=len(tokenizer), max_position_embeddings=4096)).save_pretrained(place / "llama")
    tokenizer.save_pretrained(place / "llama")
    return place


def test_the_commands_run_in_order(place: Path) -> None:
    """Convert, read, ask, save, load, ask: every command that the README shows for it."""
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("python scripts/")]
    assert len(commands) >= 3 and any(HUB_ID in command for command in commands)
    for command in commands:
        script, *arguments = shlex.split(command)[1:]
        arguments = ["llama" if argument == HUB_ID else argument for argument in arguments]
        if script == "scripts/evaluate.py":
            arguments = [str(ROOT / arguments[0]), *arguments[1:], "--samples", "1"]
        if script == "scripts/train.py":
            arguments = [str(ROOT / arguments[0]), *arguments[1:], *FEWER]
        done = subprocess.run(
            [sys.executable, ROOT / script, *arguments], cwd=place, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert (place / "book.safetensors").exists()
    assert (place / "passkey/model/config.json").exists()
    cells = json.loads((place / "results/results.json").read_text())["cells"]
    assert cells["passkey/16384/0"]["accuracy"] == {"memory": 1.0, "off": 0.0}


def test_the_python_runs_in_order(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of Python are one session, on the model that the commands have made."""
    monkeypatch.chdir(place)
    session: dict = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), session)
    assert session["answer"].shape[1] > session["question"].shape[1]
    assert session["cache"].get_seq_length() == session["ids"].shape[1]


# TRL, PEFT and Trainer set what Transformers has renamed.
@pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning")
def test_the_training_guide_runs_in_order(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Python is one session, its command is the README's, its options and recipes are those there are."""
    monkeypatch.chdir(place)
    session: dict = {}
    for block in blocks("python", TRAINING):
        exec(compile(block, "training.md", "exec"), session)
    assert session["loss"].isfinite() and session["adapted"].peft_config
    assert set(blocks("bash", TRAINING)) <= set(blocks("bash"))
    recipes = {path.name for path in (ROOT / "scripts/recipes").glob("*.yaml")}
    assert set(re.findall(r"^\| `(\w+\.yaml)`", TRAINING, flags=re.MULTILINE)) == recipes
    assert set(re.findall(r"--(\w+)", TRAINING)) <= {f.name for f in dataclasses.fields(TrainingOptions)} | {
        "config_file",
        "help",
    }
    for block in blocks("yaml", TRAINING):
        assert set(yaml.safe_load(block)) <= {f.name for f in dataclasses.fields(TrainingOptions)}


def test_the_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {line.split()[1] for block in blocks("bash") for line in block.splitlines() if line.startswith("make ")}
    assert targets == {"demo", "test"}
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)
