"""`scripts/benchmark.py` measures what it says, on a tiny model. (No test asserts a time.)"""

import json

import pytest
import torch
from tiny import base_llama, tiny_model

from infini_llama.scripts import benchmark

RULES = ("delta", "linear")


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
    assert base.config._attn_implementation == ours.config._attn_implementation


def test_tied_weights_are_one_parameter_of_both_models(tmp_path) -> None:
    """A step of the base Llama computes one gradient for them, as ours does."""
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    for model in benchmark.load_pair(str(tmp_path), torch.float32, "cpu"):
        assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("options", [[], ["--no-checkpointing", "--autocast", "--optimizer-step"]])
def test_training_steps_are_compared_with_both_floors(folder, options, capsys, monkeypatch) -> None:
    """Per length and rule: our step, the base's on one batch and on batches of our blocks. No step changes a weight."""
    pair = benchmark.load_pair(str(folder), torch.float32, "cpu", segment_length=5, block_segments=2)
    before = {name: x.clone() for name, x in pair[0].state_dict().items()}
    calls, optimizer_steps = [], []

    def record(model, args: tuple, inputs: dict) -> None:
        modes = (model.model.gradient_checkpointing, torch.is_autocast_enabled("cpu"))
        calls.append((model.config.model_type, *inputs["input_ids"].shape, *modes))

    for model in pair:
        model.register_forward_pre_hook(record, with_kwargs=True)
    adamw_step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: optimizer_steps.append(adamw_step(self)))
    monkeypatch.setattr(benchmark, "load_pair", lambda *args, **kwargs: pair)
    benchmark.main([str(folder), "--tasks", "train", "--segments", "2", "3", "--repeats", "1", *options])
    rows = json.loads(capsys.readouterr().out)["train"]
    assert [(row["segments"], row["rule"]) for row in rows] == [(n, rule) for n in (2, 3) for rule in RULES]
    for row in rows:
        assert row["tokens_per_s"] > 0 and row["pair_ratios"]["min"] > 0 and row["in_blocks"]["pair_ratios"]["min"] > 0
    texts = [("llama", 3, 5), ("llama", 2, 5), ("llama", 1, 5), *[("infini_llama", 1, 15)] * len(RULES)]
    assert calls[-len(texts) :] == [(*text, not options, bool(options)) for text in texts]
    # Two lengths, a round of warm-up and one that counts, and the two floors beside the rules.
    assert len(optimizer_steps) == (2 * 2 * (2 + len(RULES)) if options else 0)
    assert all(torch.equal(x, before[name]) for name, x in pair[0].state_dict().items())
    assert all(parameter.grad is None for model in pair for parameter in model.parameters())


@pytest.mark.parametrize("option", ["--segments", "--repeats", "--memory-segments"])
def test_counts_below_one_are_refused(option, capsys) -> None:
    """Before anything is loaded, in words that name the option."""
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["none", option, "0"])
    assert f"{option}: 0 is less than 1" in capsys.readouterr().err


def test_memory_is_measured_in_processes_of_their_own(capsys) -> None:
    """The peak of a process that reads a prompt, and what the prompt added to it; nothing of who started it."""
    ballast = torch.ones(2**28)
    benchmark.main(["none", "--tasks", "memory", "--lengths", "600", "1200"])
    result = json.loads(capsys.readouterr().out)["memory"]
    assert set(result["lengths"]) == {"600", "1200"}
    ballast_mb = ballast.nbytes / 2**20
    assert all(ballast_mb > child["peak_mb"] >= child["start_mb"] > 0 for child in result["lengths"].values())


def test_activations_of_training_are_measured_beside_weights_and_gradients(capsys) -> None:
    """They grow with the text if all are kept, and much less with checkpointed blocks."""
    benchmark.main(["none", "--tasks", "train-memory", "--memory-segments", "8", "16"])
    result = json.loads(capsys.readouterr().out)["train_memory"]
    assert set(result) == {"checkpointed", "plain"}
    for mode in result.values():
        assert set(mode["segments"]) == {"8", "16"}
        for child in mode["segments"].values():
            assert child["activations_mb"] == child["peak_mb"] - child["start_mb"] > 0
    # One block and two: kept, twice the activations, checkpointed those of one. Half way between is far from the noise.
    assert result["checkpointed"]["long_over_short"] < 1.5 < result["plain"]["long_over_short"]
