"""`scripts/benchmark.py` measures what it says, on a tiny model. (No test asserts a time.)"""

import json

import pytest
import torch
from tiny import base_llama, tiny_model

from infini_llama.scripts import benchmark


@pytest.fixture(params=["converted", "plain Llama"])
def folder(request: pytest.FixtureRequest, tmp_path):
    model = tiny_model()
    (model if request.param == "converted" else base_llama(model)).save_pretrained(tmp_path)
    return tmp_path


def test_prefill_and_decode_end_in_one_json_document(folder, capsys) -> None:
    """Every figure that is asked for is in the last line of stdout, and nothing else is on stdout."""
    threads = ["--threads", str(torch.get_num_threads())]
    sizes = [
        "--segments",
        "2",
        "3",
        "--repeats",
        "2",
        "--contexts",
        "7",
        "32",
        "--tokens",
        "6",
        "--segment-length",
        "5",
    ]
    benchmark.main([str(folder), "--tasks", "prefill", "decode", *sizes, *threads])
    result = json.loads(capsys.readouterr().out)
    assert [(row["segments"], row["rule"]) for row in result["prefill"]] == [
        (2, "delta"),
        (2, "linear"),
        (3, "delta"),
        (3, "linear"),
    ]
    assert all(row["ratio_of_medians"] > 0 and row["pair_ratios"]["min"] > 0 for row in result["prefill"])
    decode = result["decode"]
    # 7 and 32 tokens stand at slot 2 of 5: within six tokens each completes one segment.
    assert decode["completing_tokens"] == 2 and decode["completing_over_median"] > 0
    assert result["theory"]["ratio"] > 1 and result["segment_length"] == 5


def test_both_models_have_the_same_weights(folder) -> None:
    """The base Llama that is measured gives the logits of ours within a segment, from the same tensors."""
    ours, base = benchmark.load_pair(str(folder), torch.float32, "cpu", segment_length=None, block_segments=None)
    ids = torch.randint(1, ours.config.vocab_size, (1, 5))
    with torch.no_grad():
        assert torch.equal(ours(ids).logits[:, :5], base(ids).logits)
    assert base.lm_head.weight.data_ptr() == ours.lm_head.weight.data_ptr()


def test_memory_is_measured_in_processes_of_their_own(capsys) -> None:
    """The peak of a process that reads a prompt, and what the prompt added to it."""
    benchmark.main(["none", "--tasks", "memory", "--lengths", "600", "1200"])
    result = json.loads(capsys.readouterr().out)["memory"]
    assert set(result["lengths"]) == {"600", "1200"}
    assert all(child["peak_mb"] >= child["start_mb"] > 0 for child in result["lengths"].values())
