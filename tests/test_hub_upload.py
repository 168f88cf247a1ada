"""`hub_upload`: what it builds works elsewhere, what must not leave stays here, and what is pushed arrives whole."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hub_server import DROP, TOKEN, HubServer, hub_server
from huggingface_hub import ModelCard, constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_packaging import PAYLOAD
from test_remote_code import HIDE_THE_PACKAGE, run_in_fresh_process
from test_scripts import tiny_tokenizer
from tiny import base_llama, random_ids, tiny_model

from infini_llama.hub_upload.__main__ import build_parser, main
from infini_llama.hub_upload.build import is_untrained
from infini_llama.hub_upload.check import check, reference
from infini_llama.hub_upload.push import publish
from infini_llama.modeling_infini import InfiniLlamaForCausalLM
from infini_llama.scripts import evaluate
from infini_llama.scripts.convert import convert
from infini_llama.scripts.generate import InputError

ROOT = Path(__file__).parent.parent
REPO_ID = "alice/tiny"
LICENCE = "Do what you like.\n"
USUAL = ["--repo-id", REPO_ID, "--base-model", "bob/llama", "--license", "apache-2.0", "--max-shard-size", "40KB"]
NOTHING = {"public": False, "update": False, "create_pr": False, "revision": None}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In `infini/` what convert.py makes of a tiny Llama with a licence, in `shared/` what is built from that, with
    an evaluation of it; in `build.json` the report."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("hub")
    tokenizer = tiny_tokenizer()
    base_llama(tiny_model(vocab_size=len(tokenizer), max_position_embeddings=1024)).save_pretrained(place / "llama")
    tokenizer.save_pretrained(place / "llama")
    (place / "llama/LICENSE.txt").write_text(LICENCE)
    convert(place / "llama", place / "infini", segment_length=128)
    options = ["--tasks", "passkey", "gates", "--lengths", "600", "--depths", "0.5", "--samples", "1"]
    code = evaluate.main([str(place / "infini"), *options, "--device", "cpu", "--output", str(place / "results")])
    assert code == 0
    # One command, from the output of convert.py to a checked folder.
    command = [sys.executable, "-m", "hub_upload", "build", place / "infini", place / "shared", *USUAL]
    command += ["--evaluation", place / "results", "--dataset", "carol/books", "--language", "en", "--tag", "tiny"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    (place / "build.json").write_text(run.stdout.splitlines()[-1])
    return place


@pytest.fixture
def folder(place: Path, tmp_path: Path) -> Path:
    """A copy of the built folder, to be spoiled."""
    return Path(shutil.copytree(place / "shared", tmp_path / "shared"))


# Build


def test_a_built_folder_has_all_that_a_user_needs_and_nothing_else(place):
    """Sharded safetensors with the source's weights, code, tokenizer, chat template, licence, notice, pictures."""
    report = json.loads((place / "build.json").read_text())
    files = {path.relative_to(place / "shared").as_posix() for path in (place / "shared").rglob("*") if path.is_file()}
    shards = {name for name in files if name.endswith(".safetensors")}
    assert files == set(report["files"]) and len(shards) > 1
    expected = {"README.md", "config.json", "generation_config.json", "model.safetensors.index.json", "LICENSE.txt"}
    expected |= {"NOTICE", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    expected |= {"images/1_gates.png", "images/1_passkey.png"} | {path.name for path in PAYLOAD}
    assert files - shards == expected
    assert (place / "shared/LICENSE.txt").read_text() == LICENCE
    assert "derived from bob/llama" in (place / "shared/NOTICE").read_text()
    source, built = (InfiniLlamaForCausalLM.from_pretrained(place / name) for name in ("infini", "shared"))
    for name, tensor in source.state_dict().items():
        assert torch.equal(built.state_dict()[name], tensor)
    assert not [path for path in place.iterdir() if path.name.startswith(".")], "working folders are left"


def test_the_card_says_what_the_model_is(place):
    """Metadata for the Hub; the table and pictures of the evaluation, without the paths of this machine; limits."""
    card = ModelCard.load(place / "shared/README.md")
    data = card.data.to_dict()
    expected = {"base_model": "bob/llama", "license": "apache-2.0", "library_name": "transformers"}
    expected |= {"pipeline_tag": "text-generation", "datasets": ["carol/books"], "language": ["en"]}
    assert expected.items() <= data.items() and "tiny" in data["tags"]
    assert (
        f"### Evaluation of {REPO_ID}" in card.text and "#### gates" in card.text and "| 600 | memory |" in card.text
    )
    assert "![images/1_passkey.png](images/1_passkey.png)" in card.text
    assert "The memory of this model is untrained" in card.text and "2404.07143" in card.text
    assert str(place) not in card.content


# PEFT asks for what Transformers has renamed.
@pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning")
def test_an_adapter_is_merged_into_its_base(place, tmp_path, capsys):
    """The folder is that of the whole model, with the adapter's gates, in the dtype of the base."""
    model = InfiniLlamaForCausalLM.from_pretrained(place / "infini")
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["memory_gate"], init_lora_weights=False)
    adapted = get_peft_model(model, lora)
    for name, parameter in adapted.named_parameters():
        if "memory_gate.modules_to_save" in name:
            parameter.data.fill_(0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    shutil.copytree(place / "infini", tmp_path / "base")
    InfiniLlamaForCausalLM.from_pretrained(place / "infini", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    arguments = ["build", str(tmp_path / "adapter"), str(tmp_path / "built"), *USUAL]
    assert main(arguments) == 2 and "--base" in capsys.readouterr().err
    assert main([*arguments, "--base", str(tmp_path / "base")]) == 0
    built = InfiniLlamaForCausalLM.from_pretrained(tmp_path / "built")
    layer, merged = built.model.layers[0].self_attn, adapted.merge_and_unload().model.layers[0].self_attn
    assert built.dtype == layer.q_proj.weight.dtype == torch.bfloat16
    assert layer.memory_gate.bias.dtype == torch.float32 and (layer.memory_gate.bias == 0.5).all()
    torch.testing.assert_close(layer.q_proj.weight.float(), merged.q_proj.weight, rtol=2**-6, atol=2**-6)
    assert "untrained" not in (tmp_path / "built/README.md").read_text()


def test_read_gates_are_untrained_until_their_weights_move():
    model = tiny_model(read_gate=True)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.memory_gate.bias.fill_(model.config.gate_init)
            layer.self_attn.memory_gate.weight.zero_()
        assert is_untrained(model)
        model.model.layers[0].self_attn.memory_gate.weight[0, 0] = 1.0
        assert not is_untrained(model)


def test_what_cannot_be_built_is_refused_and_leaves_nothing(place, tmp_path, capsys):
    """One line that names the value and the remedy, exit status 2, no output."""
    shutil.copytree(place / "infini", tmp_path / "bare", ignore=shutil.ignore_patterns("LICENSE*"))
    results = json.loads((place / "results/results.json").read_text())
    results["settings"]["model"]["weights"] += 1
    (tmp_path / "bare/results.json").write_text(json.dumps(results))
    infini = str(place / "infini")
    cases = [
        (["build", infini, "out", "--evaluation", str(tmp_path / "bare")], "was measured with other weights"),
        (["build", str(tmp_path / "none"), "out"], "source '.*none' is no folder"),
        (["build", str(tmp_path / "bare"), "out"], "no licence file.*--license-file"),
        (["build", infini, str(place / "shared")], "is never overwritten"),
        (["build", str(place / "llama"), "out"], "convert a Llama first"),
        (["build", infini, "out", "--evaluation", str(tmp_path)], "evaluation .* cannot be used"),
        (["build", infini, "out", "--repo-id", "tiny"], "repo_id is 'tiny': .*owner/name"),
        (["build", infini, "out", "--license-file", "none"], "license_file 'none' is no file"),
    ]
    for (command, source, output, *rest), message in cases:
        output = str(tmp_path / output)
        assert main([command, source, output, *USUAL, *rest]) == 2
        captured = capsys.readouterr()
        last = captured.err.splitlines()[-1]
        assert last.startswith("error: ") and re.search(message, last), last
        assert captured.out == "" and {path.name for path in tmp_path.iterdir()} == {"bare"}


# Check


def spoil_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def spoil_card(folder: Path, old: str, new: str) -> None:
    text = (folder / "README.md").read_text()
    assert old in text
    (folder / "README.md").write_text(text.replace(old, new))


def spoil_weights(folder: Path, change) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    change(next(iter(tensors.values())))
    save_file(tensors, path, metadata={"format": "pt"})


SPOILT = {
    "missing payload file": (lambda f: (f / "memory_infini.py").unlink(), "memory_infini.py.* is missing"),
    "stale payload": (
        lambda f: (f / "cache_infini.py").write_text((f / "cache_infini.py").read_text() + "\n"),
        "cache_infini.py is stale",
    ),
    "NaN weight": (lambda f: spoil_weights(f, lambda x: x.view(-1)[3:4].fill_(torch.nan)), "has NaN or infinity"),
    "infinite weight": (lambda f: spoil_weights(f, lambda x: x.view(-1)[:1].fill_(-torch.inf)), "has NaN or infinity"),
    "wrong auto_map": (
        lambda f: spoil_json(f / "config.json", auto_map={"AutoConfig": "configuration_infini.InfiniLlamaConfig"}),
        "config.json has auto_map",
    ),
    "pickle with its name": (lambda f: torch.save({}, f / "training_args.bin"), "training_args.bin is a pickle"),
    "pickle in disguise": (lambda f: torch.save({}, f / "tokenizer.model"), "tokenizer.model is a pickle"),
    "file outside the list": (lambda f: (f / "notes.txt").write_text("todo"), "notes.txt does not belong"),
    "token in the config": (
        lambda f: spoil_json(f / "config.json", note=TOKEN),
        "config.json holds a Hugging Face token",
    ),
    "token in the vocabulary": (
        lambda f: spoil_json(f / "tokenizer.json", note=TOKEN),
        "tokenizer.json holds a Hugging",
    ),
    "absolute path": (
        lambda f: spoil_json(f / "tokenizer_config.json", name_or_path="/data/runs/7/model"),
        "absolute path '/data/runs/7/model'",
    ),
    "user name": (lambda f: spoil_card(f, "## Limits", "## Limits, by mallory"), "holds your user name 'mallory'"),
    "card without licence": (lambda f: spoil_card(f, "license: apache-2.0\n", ""), "names no license"),
    "no licence file": (lambda f: (f / "LICENSE.txt").unlink(), "no licence file"),
    "missing shard": (lambda f: sorted(f.glob("*.safetensors"))[0].unlink(), "loading failed"),
    "other weights": (lambda f: spoil_weights(f, lambda x: x.mul_(1.01)), "comparing the logits .* failed"),
    "card whose code fails": (lambda f: spoil_card(f, "max_new_tokens=50", "max_new_token=50"), "block 1 of Python"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_the_check_catches(name, place, folder, monkeypatch):
    """Each fault alone, in a folder that passes without it, is named with its file and a remedy."""
    spoil, message = SPOILT[name]
    monkeypatch.setenv("USER", "mallory")
    spoil(folder)
    with pytest.raises(InputError, match=message) as caught:
        check(folder, reference(InfiniLlamaForCausalLM.from_pretrained(place / "infini")))
    # Nothing else is found wrong, but for what follows from the fault.
    assert str(caught.value).count(";") <= (name == "pickle with its name")
    assert TOKEN not in str(caught.value)


# Push


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    """A Hub on this machine, for this process too, with retries that do not wait."""
    with hub_server() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield hub


def outside(hub: HubServer, home: Path) -> dict[str, str]:
    """The environment of a process for which `hub` is the Hub."""
    own = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | own


USE_THE_DOWNLOAD = f"""{HIDE_THE_PACKAGE}
import torch
from transformers import AutoModelForCausalLM

expected = torch.load(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"], rtol=1e-4, atol=1e-4)
"""


def test_what_is_pushed_can_be_downloaded_and_gives_the_same_logits(place, hub, tmp_path, capsys):
    """Nothing is sent without --upload; with it there is one commit, in a private repository, tagged; the downloaded
    copy is equal, and gives the source's logits where this project is not. With the processes that a user has."""
    assert main(["push", str(place / "shared"), REPO_ID]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["dry_run"] and "model-00001-of-" in captured.err and hub.requests == []

    command = [sys.executable, "-m", "hub_upload", "push", place / "shared", REPO_ID, "--upload"]
    environment = outside(hub, tmp_path / "home")
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 500}
    run = subprocess.run(command, **options)
    assert run.returncode == 0, run.stderr
    report, repo = json.loads(run.stdout.splitlines()[-1]), hub.repos[REPO_ID]
    assert repo.private and report["private"] and len(repo.commits) == 2  # the first is the Hub's own
    assert repo.refs["main"] == report["commit"] and list(repo.tags.values()) == [report["commit"]]
    assert any("/large/" in request for request in hub.requests)

    download = "import sys, huggingface_hub as h; h.snapshot_download(sys.argv[1], local_dir=sys.argv[2])"
    run = subprocess.run([sys.executable, "-c", download, REPO_ID, tmp_path / "copy"], **options)
    assert run.returncode == 0, run.stderr
    for name in report["files"]:
        assert (tmp_path / "copy" / name).read_bytes() == (place / "shared" / name).read_bytes()
    ids = random_ids(1, 300)
    with torch.no_grad():
        logits = InfiniLlamaForCausalLM.from_pretrained(place / "infini")(ids).logits
    torch.save({"ids": ids, "logits": logits}, tmp_path / "expected.pt")
    run_in_fresh_process(USE_THE_DOWNLOAD, tmp_path / "fresh", tmp_path / "copy", tmp_path / "expected.pt")


def test_the_readmes_commands_are_understood():
    """Those of the README's section on sharing."""
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("python -m hub_upload")]
    commands = [build_parser().parse_args(shlex.split(line)[3:]).command for line in lines]
    assert commands == ["build", "push"]


def test_the_repository_is_the_one_that_the_card_names(place, capsys):
    assert main(["push", str(place / "shared"), "alice/other"]) == 2
    assert "build the folder with --repo-id alice/other" in capsys.readouterr().err


def test_a_repository_with_files_is_changed_on_request_only(place, folder, hub):
    """Without a flag it is left alone; a pull request leaves main alone; an update is one commit that leaves nothing
    behind of what was there, and does not move the tag."""
    first = publish(folder, REPO_ID, **NOTHING)
    repo = hub.repos[REPO_ID]
    before = dict(repo.refs)
    with pytest.raises(InputError, match="has files already: .*--update.*--create-pr"):
        publish(folder, REPO_ID, **NOTHING)
    assert repo.refs == before
    (folder / "NOTICE").write_text("changed")
    proposed = publish(folder, REPO_ID, **NOTHING | {"create_pr": True})
    assert proposed["url"].endswith("/discussions/1") and repo.refs["main"] == before["main"]
    (folder / "LICENSE.txt").rename(folder / "LICENSE")
    updated = publish(folder, REPO_ID, **NOTHING | {"update": True})
    files = repo.commits[updated["commit"]]
    assert set(files) == {".gitattributes"} | {p.relative_to(folder).as_posix() for p in folder.rglob("*.*")} | {
        "LICENSE",
        "NOTICE",
    }
    assert updated["tag"] is None and list(repo.tags.values()) == [first["commit"]]


def test_a_branch_is_made_and_main_stays(folder, hub):
    report = publish(folder, REPO_ID, **NOTHING | {"revision": "next"})
    repo = hub.repos[REPO_ID]
    assert repo.refs["next"] == report["commit"] and list(repo.commits[repo.refs["main"]]) == [".gitattributes"]


def test_a_public_repository_takes_public(folder, hub):
    """What is private by default does not end up in a repository that everyone sees."""
    assert not publish(folder, REPO_ID, **NOTHING | {"public": True})["private"]
    with pytest.raises(InputError, match="is public: add --public"):
        publish(folder, REPO_ID, **NOTHING | {"update": True})


@pytest.mark.parametrize(
    "fault, message",
    [
        ({"POST /api/validate-yaml": [(400, "no such license")]}, "rejects README.md .*no such license"),
        ({"POST .*/commit/": [(400, "Invalid metadata")]}, "answers 400 .*Invalid metadata"),
        ({"POST /api/repos/create": [(403, "no write access")]}, "answers 403 .*take one with write access"),
        ({"POST .*/batch": [(401, "Invalid credentials in Authorization header")]}, "answers 401 .*log in again"),
        ({"POST .*/commit/": [(503, "busy")]}, "answers 503 .*try again later"),
        ({"POST .*/commit/": [DROP]}, "the connection broke .*run this again"),
        ({"PUT /large/": [DROP] * 200}, "the connection broke .*run this again"),
        ({"GET /api/whoami-v2": [DROP]}, "the connection broke"),
    ],
    ids=lambda value: None if isinstance(value, str) else "{}: {[0]}".format(*next(iter(value.items()))),
)
def test_a_push_that_fails_publishes_nothing_and_can_be_repeated(fault, message, folder, hub):
    """Wherever it fails, the message is one line with a remedy, no file and no tag is there, and the same command
    succeeds when the cause is gone, without a flag and without sending large files twice."""
    hub.faults = fault
    with pytest.raises(InputError, match=message) as caught:
        publish(folder, REPO_ID, **NOTHING)
    assert "\n" not in str(caught.value)
    repo = hub.repos.get(REPO_ID)
    assert repo is None or (set(repo.commits[repo.refs["main"]]) == {".gitattributes"} and not repo.tags)
    hub.faults, arrived = {}, len(hub.large)
    hub.requests.clear()
    assert publish(folder, REPO_ID, **NOTHING)["tag"] is not None
    sent = {request.split("/")[2] for request in hub.requests if request.startswith("PUT /large/")}
    assert len(sent) == len(hub.large) - arrived


def test_an_upload_survives_a_connection_that_breaks_once(folder, hub):
    hub.faults = {"PUT /large/": [DROP]}
    assert publish(folder, REPO_ID, **NOTHING)["commit"] == hub.repos[REPO_ID].refs["main"]


def test_a_tag_that_fails_is_told_apart_from_files_that_failed(folder, hub):
    """The files are public knowledge then, and the same command with --update sets the tag."""
    hub.faults = {"POST .*/tag/": [(500, "oops")]}
    with pytest.raises(InputError, match="are published as .* without their tag"):
        publish(folder, REPO_ID, **NOTHING)
    assert publish(folder, REPO_ID, **NOTHING | {"update": True})["tag"] in hub.repos[REPO_ID].tags
    assert len(hub.repos[REPO_ID].commits) == 2


@pytest.mark.parametrize("token, message", [("hf_wrong", "your token is not accepted"), ("", "you are not logged in")])
def test_credentials_are_huggingface_hubs_own(token, message, folder, hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(InputError, match=message):
        publish(folder, REPO_ID, **NOTHING)
    assert hub.repos == {}
