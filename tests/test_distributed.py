"""`scripts/train.py` in two processes, with the configurations in `scripts/launch/`: the numbers of one process."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_scripts import TEXT, tiny_tokenizer
from tiny import tiny_model

from infini_llama.modeling_infini import InfiniLlamaForCausalLM

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="scripts/train.py needs Datasets"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="processes on CPUs need gloo"),
]
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)

# Accelerate sets FSDP and DeepSpeed up only for accelerators. Here CPUs pass for some, and for DeepSpeed's own
# all-reduce in shared memory, which would be compiled for minutes, stands gloo's.
CPUS_AS_ACCELERATORS = """
import os, runpy, sys

from accelerate import PartialState
from accelerate.utils import DistributedType

PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# Two stages, of three and of four blocks of three segments of five tokens.
OPTIONS = "--sequence_length 45 60 --stage_steps 2 --batch_tokens 90 --max_steps 4 --save_steps 2 --mixed_precision no"
OPTIONS += " --learning_rate 0.01 --weight_decay 0.1 --max_grad_norm 3 --report_to none"
COPY = '{"task": "copy", "num_tokens": 3}'
MEMORIES_AND_ADAPTER = [
    *"--state_passing 0.5 --state_passing_tokens 200 --lora_rank 2 --lora_target_modules q_proj v_proj".split(),
    *("--eval_sequences", "3", "--eval_data", COPY),
]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Run train.py with a configuration, or as one process without, and return its output; each run is run once."""
    root, outputs = tmp_path_factory.mktemp("distributed"), {}
    book, shim = root / "book", root / "cpus_as_accelerators.py"
    book.mkdir()
    for index in range(3):
        (book / f"{index}.txt").write_text(TEXT * (index + 1), encoding="utf-8")
    shim.write_text(CPUS_AS_ACCELERATORS, encoding="utf-8")
    tokenizer = tiny_tokenizer()
    for name, tied in (("free", False), ("tied", True)):
        torch.manual_seed(0)
        tiny_model(vocab_size=len(tokenizer), tie_word_embeddings=tied).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)

    def train(config: str | None, model: str, *options: str, output: Path | None = None) -> Path:
        key = (config, model, *options)
        if output is None and key in outputs:
            return outputs[key]
        target = output or root / f"output-{len(outputs)}"
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        command = [sys.executable]
        if config is not None:
            command += ["-m", "accelerate.commands.launch", "--num_processes", "2"]
            command += ["--config_file", str(ROOT / f"scripts/launch/{config}.yaml")]
        if config == "ddp":
            environment["ACCELERATE_USE_CPU"] = "true"
        elif config is not None:
            environment["ACCELERATE_TORCH_DEVICE"] = "cpu"
            command += [str(shim)]
        command += [str(ROOT / "scripts/train.py"), "--model", str(root / model), "--output", str(target)]
        command += ["--data", str(book), COPY, *OPTIONS.split(), *options]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        if output is None:
            outputs[key] = target
        return target

    return train


def log_of(output: Path) -> list[dict[str, Any]]:
    """The records of all steps, without what depends on the time it takes."""
    records = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in record.items() if k not in ("seconds", "tokens_per_second")} for record in records]


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    return InfiniLlamaForCausalLM.from_pretrained(output / "model").state_dict()


def assert_same_run(output: Path, expected: Path) -> None:
    """float32 sums in another order: measured up to 5e-7 on losses of 7, 2e-6 on norms of 10, and 1e-6 on weights, where
    AdamW makes whole steps of small gradients.
    """
    assert len(log_of(output)) == len(log_of(expected)) == 4
    for record, other in zip(log_of(output), log_of(expected)):
        torch.testing.assert_close(record, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights_of(output), weights_of(expected), rtol=0, atol=1e-4)
    stored = [load_file(folder / "model" / "model.safetensors").keys() for folder in (output, expected)]
    assert stored[0] == stored[1]


@pytest.mark.parametrize(
    ("config", "model"),
    [("ddp", "free"), ("fsdp2", "tied"), pytest.param("deepspeed_zero2", "free", marks=needs_deepspeed)],
)
def test_two_processes_train_what_one_does(train, config, model):
    """Two processes with two batches each are one with four, in every loss, norm and rate, through two stages, with a
    text and a task, several blocks per sequence, checkpointed; and in the exported weights, gates too.
    """
    one = train(None, model, "--gradient_accumulation_steps", "4")
    two = train(config, model, "--gradient_accumulation_steps", "2")
    assert_same_run(two, one)
    assert any(len(record["losses"]) == 2 for record in log_of(two))  # processes had batches of different sources
    start = InfiniLlamaForCausalLM.from_pretrained(one.parent / model).state_dict()
    gates = {name: x for name, x in weights_of(two).items() if "memory_gate" in name}
    # Not each of its heads: in four steps one may go back where it came from.
    assert len(gates) == 2 and all((x - start[name]).abs().max() > 1e-3 for name, x in gates.items())


def test_a_sharded_model_carries_memories_evaluates_and_exports_an_adapter(train):
    """With state passing, where processes extend their memories in different steps, FSDP2 gives what DDP gives:
    losses, evaluation, and the adapter, merged into a model.
    """
    whole, sharded = (train(config, "free", *MEMORIES_AND_ADAPTER) for config in ("ddp", "fsdp2"))
    assert_same_run(sharded, whole)
    assert log_of(sharded)[-1]["evaluation"]["copy"]["60"].keys() == {"on", "off"}
    files = [sorted(file.name for file in (output / "adapter").iterdir()) for output in (whole, sharded)]
    assert files[0] == files[1] and "adapter_model.safetensors" in files[0]


@pytest.mark.parametrize(
    ("config", "model", "options"),
    [("ddp", "free", MEMORIES_AND_ADAPTER), ("fsdp2", "tied", ["--gradient_accumulation_steps", "2"])],
)
def test_two_processes_go_on_from_their_checkpoint(train, config, model, options, tmp_path):
    """A run that was stopped after step 2 has, resumed, the steps and weights of one that was not."""
    whole, resumed = train(config, model, *options), tmp_path / "resumed"
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-4")
    shutil.rmtree(resumed / "model")
    train(config, model, *options, "--resume", "true", output=resumed)
    assert_same_run(resumed, whole)


def test_a_sharded_model_in_bfloat16_has_a_loss_in_float32(train):
    """As it has with DDP, whose autocast leaves it alone; means of two bfloat16 would have few enough bits for float16."""
    output = train("fsdp2", "free", "--mixed_precision", "bf16", "--max_steps", "1", "--save_steps", "0")
    loss = torch.tensor(log_of(output)[0]["loss"])
    assert loss.isfinite() and loss != loss.half()
