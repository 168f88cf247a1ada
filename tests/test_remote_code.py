"""A saved model stands alone: with `trust_remote_code`, it runs where this package is not installed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_packaging import PAYLOAD
from tiny import random_ids, tiny_model

from infini_llama.cache_infini import InfiniCache

N = 5  # of tiny_config
# `infini_llama` cannot be imported, and the working directory holds nothing that could stand in for it.
HIDE_THE_PACKAGE = """
import sys

class Hidden:
    @staticmethod
    def find_spec(name, *args):
        if name.partition(".")[0] == "infini_llama":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden)
"""


# As in this process: `-W` would take the name of a whole module, and Transformers logs half of its deprecations.
DEPRECATIONS_ARE_ERRORS = """
import logging, warnings

for category in (FutureWarning, DeprecationWarning):
    warnings.filterwarnings("error", category=category, module="transformers")  # and `transformers_modules`

class Raise(logging.Handler):
    def emit(self, record):
        if "deprecat" in record.getMessage().lower():
            raise FutureWarning(record.getMessage())

logging.getLogger("transformers").addHandler(Raise(level=logging.WARNING))
"""


def run_in_fresh_process(program: str, home: Path, *arguments: str | Path) -> None:
    """Run a program offline, with empty caches of Hugging Face below `home`."""
    home.mkdir()
    caches = {"HF_HOME": str(home / "hf"), "HF_MODULES_CACHE": str(home / "modules"), "HF_HUB_OFFLINE": "1"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | caches
    command = [sys.executable, "-c", DEPRECATIONS_ARE_ERRORS + program, *map(str, arguments)]
    run = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.fixture
def saved(tmp_path) -> Path:
    """A tiny model in `model/`, and in `expected.pt` what it does with a text of several segments."""
    model, ids = tiny_model(), random_ids(2, 6 * N + 3)
    model.save_pretrained(tmp_path / "model")
    cache = InfiniCache(model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache, logits_to_keep=1)
        cache.save(tmp_path / "memory.safetensors")
        question = random_ids(2, N + 1)
        expected = {
            "ids": ids,
            "logits": model(ids).logits,
            "tokens": model.generate(ids, max_new_tokens=2 * N, do_sample=False),
            "question": question,
            "answer": model(question, past_key_values=cache).logits,
        }
    torch.save(expected, tmp_path / "expected.pt")
    return tmp_path


def test_a_saved_model_holds_the_whole_payload(saved):
    """Beside the weights there is every payload file, unchanged, and all auto classes find theirs in it."""
    for path in PAYLOAD:
        assert (saved / "model" / path.name).read_text() == path.read_text()
    assert json.loads((saved / "model/config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_infini.InfiniLlamaConfig",
        "AutoModel": "modeling_infini.InfiniLlamaModel",
        "AutoModelForCausalLM": "modeling_infini.InfiniLlamaForCausalLM",
        "AutoModelForSequenceClassification": "modeling_infini.InfiniLlamaForSequenceClassification",
    }


USE_A_MODEL_REPO = f"""{HIDE_THE_PACKAGE}
from pathlib import Path
import torch
from transformers import AutoConfig, AutoModelForCausalLM

folder, root, copy = map(Path, sys.argv[1:])
expected = torch.load(root / "expected.pt")
ids = expected["ids"]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
for cls in (type(config), type(model)):
    assert cls.__module__.startswith("transformers_modules."), cls
assert type(model.config) is type(config)

# The same operations on the same numbers, with another number of threads perhaps.
def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

with torch.no_grad():
    assert_close(model(ids).logits, expected["logits"])
    tokens = model.generate(ids, max_new_tokens={2 * N}, do_sample=False)
    assert torch.equal(tokens, expected["tokens"])

    # The memory file that the package wrote, and one written here.
    InfiniCache = sys.modules[type(model).__module__].InfiniCache
    cache = InfiniCache(model.config)
    model(ids, past_key_values=cache, logits_to_keep=1)
    cache.save("memory.safetensors")
    for path in (root / "memory.safetensors", "memory.safetensors"):
        cache = InfiniCache.load(path, model)
        assert_close(model(expected["question"], past_key_values=cache).logits, expected["answer"])

model.save_pretrained(copy)
assert "infini_llama" not in sys.modules
"""


def test_a_saved_model_runs_without_the_package_and_so_does_its_copy(saved):
    """Where `infini_llama` cannot be imported, offline and with empty caches: logits over several segments, text
    across a boundary, and memory files are those of the package; what is saved there does the same without the first.
    """
    run_in_fresh_process(USE_A_MODEL_REPO, saved / "first", saved / "model", saved, saved / "copy")
    shutil.rmtree(saved / "model")
    run_in_fresh_process(USE_A_MODEL_REPO, saved / "second", saved / "copy", saved, saved / "copy of the copy")
    files = {path.name for path in (saved / "copy").iterdir()}
    assert files == {path.name for path in (saved / "copy of the copy").iterdir()} >= {path.name for path in PAYLOAD}


OTHER_AUTO_CLASSES = f"""{HIDE_THE_PACKAGE}
from transformers import AutoModel, AutoModelForSequenceClassification

for auto_class, name in (
    (AutoModel, "InfiniLlamaModel"),
    (AutoModelForSequenceClassification, "InfiniLlamaForSequenceClassification"),
):
    assert type(auto_class.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__ == name
"""


def test_every_auto_class_loads_a_saved_model_without_the_package(saved):
    """`AutoModel` and `AutoModelForSequenceClassification` too, from the folder of a causal language model."""
    run_in_fresh_process(OTHER_AUTO_CLASSES, saved / "home", saved / "model")


BOTH_IN_ONE_PROCESS = """
import sys
from pathlib import Path
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

root, order = Path(sys.argv[1]), sys.argv[2:]
expected = torch.load(root / "expected.pt")

def package():
    from infini_llama.modeling_infini import InfiniLlamaForCausalLM
    return InfiniLlamaForCausalLM

def remote():
    # What the auto classes do, which prefer the package once that is imported.
    return get_class_from_dynamic_module("modeling_infini.InfiniLlamaForCausalLM", str(root / "model"))

classes = [{"package": package, "remote": remote}[name]() for name in order]
models = [cls.from_pretrained(root / "model") for cls in classes]
assert classes[0] is not classes[1] and [type(model) for model in models] == classes
with torch.no_grad():
    for cls, model in zip(classes, models):
        assert type(AutoModelForCausalLM.from_config(model.config)) is cls
        torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"], rtol=1e-4, atol=1e-4)
        tokens = model.generate(expected["ids"], max_new_tokens=7, do_sample=False)
        assert torch.equal(tokens, expected["tokens"][:, : tokens.shape[1]])
assert type(AutoModelForCausalLM.from_pretrained(root / "model")) in classes
"""


@pytest.mark.parametrize("order", [("package", "remote"), ("remote", "package")], ids="{0[0]} first".format)
def test_package_and_remote_code_live_in_one_process(saved, order):
    """Whichever comes first, each builds and runs models of its own classes, and the auto classes know both."""
    run_in_fresh_process(BOTH_IN_ONE_PROCESS, saved / "home", saved, *order)


TWO_REPOS = f"""{HIDE_THE_PACKAGE}
from transformers import AutoModelForCausalLM

for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert sys.modules[type(model).__module__].VERSION == folder[-1], "this model runs the code of another repository"
"""


def test_two_model_repos_run_their_own_code_in_one_process(saved):
    """Two folders with different versions of the payload, loaded one after the other: each runs its own."""
    for version in "12":
        shutil.copytree(saved / "model", saved / f"model{version}")
        with (saved / f"model{version}" / "modeling_infini.py").open("a") as file:
            file.write(f'\nVERSION = "{version}"\n')
    run_in_fresh_process(TWO_REPOS, saved / "home", saved / "model1", saved / "model2")
