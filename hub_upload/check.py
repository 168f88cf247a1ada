"""Look at everything that would leave this machine, and use it as a stranger would, in a process of its own."""

import fnmatch
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, get_token
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.dynamic_module_utils import get_relative_import_files

from infini_llama import modeling_infini
from infini_llama.configuration_infini import InfiniLlamaConfig
from infini_llama.hub_upload.card import repo_id_of
from infini_llama.modeling_infini import InfiniLlamaForCausalLM
from infini_llama.scripts.convert import COMPANIONS, LICENCES
from infini_llama.scripts.generate import InputError, load_model, one_line, say

__all__ = ["check", "files_of", "reference"]

# What `save_pretrained` copies.
PAYLOAD = [Path(modeling_infini.__file__), *map(Path, get_relative_import_files(modeling_infini.__file__))]
ALLOWED = (
    "README.md",
    "config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "images/*.png",
    ".gitattributes",
    *COMPANIONS,
    *(path.name for path in PAYLOAD),
)
REQUIRED = ("README.md", "config.json", "generation_config.json", "tokenizer_config.json")
# By its content: a pickle of protocol 2 to 5, and what torch.save and numpy make. By its name: older ones.
PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04", b"\x93NUMPY")
PICKLE_NAMES = (".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth")
SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a GitHub token": r"\b(gh[oprsu]_[A-Za-z0-9]{30,}|github_pat_\w{30,})",
    "an AWS key": r"\bAKIA[0-9A-Z]{16}\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": r"""\b\w+://[^\s/:@"']+:[^\s/@"']+@""",
}
ABSOLUTE_PATH = r"""(?<![\w.:/<>~-])/(?:[\w.-]+/)+[\w.-]+|\b[A-Za-z]:\\{1,2}\w"""
# Full of words and pieces of code that belong to nobody.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.*", "merges.txt")
# Names of users that are words, and give nobody away.
ANYBODY = {"", "admin", "home", "nobody", "root", "runner", "ubuntu", "user"}
# Nothing in the weights depends on N; short segments make the comparison as cheap for any N.
SHORT_SEGMENT = 64


def check(folder: str | os.PathLike, expected: dict[str, torch.Tensor] | None = None) -> dict[str, Any]:
    """Make sure that a folder may be shared, and that it works where this project is not installed.

    Args:
        folder: what `build` has made.
        expected: what `reference` gives for the model that it was made from; by default, for the folder itself.

    Returns:
        The report: names of files with their bytes, what was compared.

    Raises:
        InputError: it must not be shared; the message names everything that is wrong with the files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"folder '{folder}' does not exist: give one that `build` has made")
    problems = [problem for look in LOOKS for problem in look(folder)]
    if problems:
        raise InputError(f"folder '{folder}' must not be shared: {'; '.join(problems)}")
    say("the files are as they should be; loading them in a process without this project")
    difference = try_as_a_stranger(folder, expected or reference(load_model(str(folder))[0]))
    files = {name: path.stat().st_size for name, path in files_of(folder).items()}
    return {"folder": str(folder), "files": files, "bytes": sum(files.values()), "max_abs_diff": difference}


def files_of(folder: Path) -> dict[str, Path]:
    """Return the files of a folder by their names in the repository."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if not path.is_dir()}


def is_one_of(name: str, patterns: tuple[str, ...]) -> bool:
    # Unlike a shell's, these stars match slashes, too.
    return any(fnmatch.fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def text_of(path: Path) -> str | None:
    """Return the text of a file, or None if it is none."""
    try:
        return None if path.suffix == ".safetensors" else path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


# What is wrong with the files


def look_at_names(folder: Path) -> Iterator[str]:
    files = files_of(folder)
    for name, path in files.items():
        if not is_one_of(name, ALLOWED):
            yield f"{name} does not belong into a model repository: remove it"
        elif path.is_symlink():
            yield f"{name} is a link: put the file there"
    for name in REQUIRED:
        if name not in files:
            yield f"{name} is missing: build the folder again"
    if not any(is_one_of(name, LICENCES[:2]) for name in files):
        yield "there is no licence file: build the folder again, with --license-file"


def look_at_payload(folder: Path) -> Iterator[str]:
    for source in PAYLOAD:
        path = folder / source.name
        if not path.is_file():
            yield f"{source.name}, of the modeling code, is missing: build the folder again"
        elif path.read_bytes() != source.read_bytes():
            yield f"{source.name} is stale, it differs from this project's: build the folder again"


def look_for_pickles(folder: Path) -> Iterator[str]:
    for name, path in files_of(folder).items():
        # safetensors begin with a length, which may be anything; they are read as such below.
        if path.suffix != ".safetensors":
            with path.open("rb") as file:
                start = file.read(8)
            if start.startswith(PICKLES) or path.suffix in PICKLE_NAMES:
                yield f"{name} is a pickle, which runs code when it is loaded: share safetensors only"


def look_for_secrets(folder: Path) -> Iterator[str]:
    token = get_token()
    home = Path.home()
    users = {home.name, os.environ.get("USER", ""), os.environ.get("LOGNAME", "")} - ANYBODY
    for name, path in files_of(folder).items():
        # The payload is this project's own; whether it is unchanged is another question.
        if (text := text_of(path)) is None or name in {source.name for source in PAYLOAD}:
            continue
        secrets = [what for what, pattern in SECRETS.items() if re.search(pattern, text)]
        if token is not None and token in text:
            secrets.append("your token")
        if secrets:
            yield f"{name} holds {' and '.join(secrets)}: remove it there, and revoke it"
        if len(home.parts) > 2 and str(home) in text:
            yield f"{name} holds the path of your home folder: remove it"
        elif is_one_of(name, (*VOCABULARIES, *LICENCES)):
            continue
        elif found := re.search(ABSOLUTE_PATH, text):
            yield f"{name} holds the absolute path '{found.group()}': remove it"
        # Before a slash it is a namespace of the Hub.
        for user in users:
            if re.search(rf"(?<![\w/]){re.escape(user)}(?![\w/])", text):
                yield f"{name} holds your user name '{user}': remove it"


def look_at_config(folder: Path) -> Iterator[str]:
    path = folder / "config.json"
    if not path.is_file():
        return
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        yield f"config.json is broken ({one_line(error)}): build the folder again"
        return
    classes = [getattr(modeling_infini, name) for name in modeling_infini.__all__]
    auto_map = {InfiniLlamaConfig._auto_class: InfiniLlamaConfig} | {
        cls._auto_class: cls for cls in classes if vars(cls).get("_auto_class")
    }
    expected = {
        "auto_map": {auto: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for auto, cls in auto_map.items()},
        "model_type": InfiniLlamaConfig.model_type,
        "architectures": [InfiniLlamaForCausalLM.__name__],
    }
    for name, value in expected.items():
        if fields.get(name) != value:
            yield f"config.json has {name} {fields.get(name)}, not {value}: build the folder again"


def look_at_card(folder: Path) -> Iterator[str]:
    path = folder / "README.md"
    if not path.is_file():
        return
    try:
        card = ModelCard.load(path)
    except Exception as error:  # whatever YAML makes of it
        yield f"README.md has broken metadata ({one_line(error)}): correct what stands between its lines of '---'"
        return
    for field, option in (("license", "--license"), ("base_model", "--base-model")):
        if not getattr(card.data, field):
            yield f"README.md names no {field} in its metadata: add it there, or build with {option}"
    if repo_id_of(card.text) is None:
        yield "README.md has no Python that loads the model: build the folder again"


def look_at_tensors(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    if not bool(file.get_tensor(name).isfinite().all()):
                        yield f"tensor '{name}' in {path.name} has NaN or infinity: take an earlier checkpoint"
        except (SafetensorError, OSError) as error:
            yield f"{path.name} cannot be read ({one_line(error)}): build the folder again"


LOOKS = (
    look_at_names,
    look_at_payload,
    look_for_pickles,
    look_for_secrets,
    look_at_config,
    look_at_card,
    look_at_tensors,
)


# What a stranger gets


@torch.no_grad()
def reference(model: InfiniLlamaForCausalLM) -> dict[str, torch.Tensor]:
    """Return ids (1, T) of several short segments, the segment length (), and the logits (1, T, vocabulary)."""
    usual = model.config.segment_length
    model.config.segment_length = length = min(usual, SHORT_SEGMENT)
    ids = torch.randint(model.config.vocab_size, (1, 3 * length + 5), generator=torch.Generator().manual_seed(0))
    logits = model(ids).logits
    model.config.segment_length = usual
    return {"ids": ids, "segment_length": torch.tensor(length), "logits": logits}


def try_as_a_stranger(folder: Path, expected: dict[str, torch.Tensor]) -> float:
    """Run trial.py with empty caches and offline, and return the largest difference between logits."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="infini_llama_check_") as home:
        save_file(expected, Path(home) / "expected.safetensors")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_HOME": f"{home}/hf", "HF_MODULES_CACHE": f"{home}/modules", "HF_HUB_OFFLINE": "1"}
        # The same operations in the same order, as far as that is in our hands.
        environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
        # -P: neither the script's folder nor the current one is importable.
        command = [
            sys.executable,
            "-P",
            str(Path(__file__).with_name("trial.py")),
            str(folder.resolve()),
            repo_id_of(card),
        ]
        run = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    try:
        report = json.loads(run.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        report = {"step": "running", "error": f"it ended with status {run.returncode}"}
    if run.returncode != 0:
        say(run.stderr)
        raise InputError(
            f"folder '{folder}' does not work in a process without this project: {report['step']} failed "
            f"({' '.join(report['error'].split())}): correct that, or build the folder again"
        )
    return report["max_abs_diff"]
