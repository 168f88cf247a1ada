"""What must hold for the payload to travel alone, and for the repository to install and to describe itself."""

import ast
import re
import subprocess
import sys
import tomllib
import warnings
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

ROOT = Path(__file__).parent.parent
PAYLOAD = sorted(ROOT.glob("*_infini.py"))  # the files that `save_pretrained` copies into a model repo
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def installed_with(*names: str) -> set[str]:
    """The distributions `names` and everything they need, extras aside."""
    needed, to_visit = set(), [canonicalize_name(name) for name in names]
    while to_visit:
        name = to_visit.pop()
        if name not in needed:
            needed.add(name)
            requirements = map(Requirement, metadata.requires(name) or [])
            to_visit += [
                canonicalize_name(r.name) for r in requirements if not r.marker or r.marker.evaluate({"extra": ""})
            ]
    return needed


def importable_with(*names: str) -> set[str]:
    """The top-level modules of the distributions `names` and of everything they need."""
    needed = installed_with(*names)
    owners = metadata.packages_distributions().items()
    return {module for module, owner in owners if not needed.isdisjoint(map(canonicalize_name, owner))}


def imports_of(path: Path) -> list[tuple[int, str]]:
    """(level, module) of every import statement: level 0 is absolute, 1 is `from .module import y`."""
    imports = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imports += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imports.append((node.level, node.module or ""))
    return imports


def constraints(file: str = "constraints.txt") -> dict[str, str]:
    """The pinned version of each distribution in a file of constraints."""
    lines = (ROOT / file).read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pins.items()}


def promised(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for, with these extras."""
    requirements = list(PYPROJECT["project"]["dependencies"])
    for extra in extras:
        requirements += PYPROJECT["project"]["optional-dependencies"][extra]
    # An extra that includes another one names this project.
    return [r for r in map(Requirement, requirements) if canonicalize_name(r.name) != PYPROJECT["project"]["name"]]


def git_files(*options: str) -> list[Path]:
    """What `git ls-files` lists, relative to the root."""
    try:
        run = subprocess.run(["git", "ls-files", *options], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"git knows what belongs to the repository, and does not answer: {error}")
    return [Path(line) for line in run.stdout.splitlines()]


def test_the_payload_works_with_torch_and_transformers_alone(tmp_path):
    """In a folder of another name, with nothing importable but what torch and Transformers install by themselves, it is
    imported, trains, generates, and is saved and loaded with its memory.
    """
    for path in PAYLOAD:
        (tmp_path / path.name).write_text(path.read_text())
    every_module = set(metadata.packages_distributions())
    hidden = every_module - importable_with("torch", "transformers")
    assert {"accelerate", "peft", "pytest"} <= hidden
    program = f"""
import importlib, sys
from importlib.machinery import PathFinder

started_with = set(sys.modules)  # a `.pth` file may have imported some of it
find, hidden = PathFinder.find_spec, {hidden!r}
PathFinder.find_spec = lambda name, *args: None if name.partition(".")[0] in hidden else find(name, *args)
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
sys.path.insert(0, {str(tmp_path.parent)!r})
files = {{name: importlib.import_module({tmp_path.name!r} + "." + name) for name in {[p.stem for p in PAYLOAD]!r}}}

import torch
from transformers import AutoModelForCausalLM

config = files["configuration_infini"].InfiniLlamaConfig(
    vocab_size=31, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, segment_length=5
)
model = files["modeling_infini"].InfiniLlamaForCausalLM(config)
ids = torch.arange(1, 18)[None]
model(ids, labels=ids).loss.backward()
model.eval().save_pretrained("model")
loaded = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)
cache = files["cache_infini"].InfiniCache(config)
with torch.no_grad():
    model(ids[:, :12], past_key_values=cache)
cache.save("memory.safetensors")
cache = files["cache_infini"].InfiniCache.load("memory.safetensors", model)
settings = dict(max_new_tokens=7, do_sample=False)
text = model.generate(ids[:, 12:], past_key_values=cache, **settings)[:, 5:]
assert torch.equal(loaded.generate(ids, **settings)[:, 17:], text)

loaded_modules = set(sys.modules) - started_with
assert "transformers" in loaded_modules and hidden.isdisjoint(loaded_modules), hidden & loaded_modules
assert "infini_llama" not in loaded_modules
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("path", PAYLOAD, ids=lambda path: path.name)
def test_a_payload_file_imports_only_its_flat_neighbours_and_what_transformers_installs(path):
    """Transformers copies what `from .x import y` names, and refuses to load what imports anything not installed."""
    allowed = importable_with("torch", "transformers") | sys.stdlib_module_names
    for level, module in imports_of(path):
        if level == 0:
            assert module.partition(".")[0] in allowed, f"import {module}"
        else:
            assert level == 1 and ROOT / f"{module}.py" in PAYLOAD, f"from {'.' * level}{module} import ..."


@pytest.mark.parametrize("path", PAYLOAD, ids=lambda path: path.name)
def test_transformers_finds_the_neighbours_that_python_imports(path):
    """Transformers reads imports with a regular expression, which takes a docstring line `from .x import` for one."""
    reached, to_visit = set(), [path]
    while to_visit:
        neighbours = {ROOT / f"{module}.py" for level, module in imports_of(to_visit.pop()) if level == 1}
        to_visit += neighbours - reached
        reached |= neighbours
    assert set(map(Path, get_relative_import_files(path))) == reached


def test_a_saved_model_carries_the_whole_payload():
    """Every payload file is reached from the modeling file, whose closure is what `save_pretrained` copies."""
    modeling = ROOT / "modeling_infini.py"
    assert {modeling, *map(Path, get_relative_import_files(modeling))} == set(PAYLOAD)


def test_the_root_is_no_package():
    """With `__init__.py` in the root, pytest would import the tests as submodules of the folder's own name."""
    assert not (ROOT / "__init__.py").exists()


def test_the_readme_shows_every_file():
    """The tree in the README (the code block with `pyproject.toml` in it) has each tracked file of the root, scripts/,
    tests/ and hub_upload/, first on its line, and nothing that does not exist."""
    tracked, untracked = git_files(), git_files("--others", "--exclude-standard")
    if not (ROOT / "README.md").exists():
        pytest.skip("there is no README.md yet")
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    tree = next((block for block in blocks if "pyproject.toml" in block), "")
    entries = [line.lstrip("│├└─| \t").split()[0] for line in tree.splitlines() if line.strip("│| \t")]
    in_tree = {Path(entry).name for entry in entries if not entry.endswith("/")}
    expected = {path.name for path in tracked if str(path.parent) in {".", "scripts", "tests", "hub_upload"}}
    assert in_tree, "no code block of the README shows the tree"
    assert not expected - in_tree, "there are files that the README does not show"
    existing = {path.name for path in tracked + untracked}
    assert not in_tree - existing, "the README shows files that do not exist"


def test_the_constraints_lie_within_the_ranges_and_pin_every_dependency():
    """What CI installs is one of the combinations that pyproject.toml promises, and the same in every run."""
    pins = constraints()
    for requirement in promised(*PYPROJECT["project"]["optional-dependencies"]):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} has no version in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{name} {pins[name]} is outside {requirement}"


def test_the_oldest_constraints_are_the_lower_bounds():
    """What `make test-oldest` installs are the oldest versions that pyproject.toml promises; none that the payload's tests
    need is missing.
    """
    pins = constraints("constraints-oldest.txt")
    for requirement in promised(*PYPROJECT["project"]["optional-dependencies"]):
        name = canonicalize_name(requirement.name)
        if name in pins:
            (lowest,) = [Version(s.version) for s in requirement.specifier if s.operator in {">=", "=="}]
            assert Version(pins[name]) == lowest, f"{name} {pins[name]} is not the lower bound of {requirement}"
    needed = {canonicalize_name(requirement.name) for requirement in promised("gguf")}
    assert needed | {"pytest", "hypothesis"} <= set(pins)


# What Transformers deprecates


@pytest.mark.parametrize("category", [FutureWarning, DeprecationWarning])
@pytest.mark.parametrize(
    "module", ["transformers.cache_utils", "transformers_modules.repo.modeling_infini", "infini_llama.modeling_infini"]
)
def test_a_deprecation_is_an_error(module, category):
    """Whether it is due to Transformers itself, to this package or to code that came with a model folder."""
    with pytest.raises(category):
        warnings.warn_explicit("`x` is deprecated", category, "file.py", 1, module=module)


def test_a_deprecation_in_the_log_is_an_error():
    """In each of the ways in which Transformers logs, every time."""
    logger = logging.get_logger("transformers.models.llama.modeling_llama")
    for log in (logger.warning, logger.warning_once, logger.error) * 2:
        with pytest.raises(FutureWarning):
            log("`x` is deprecated and will be removed in v6")
