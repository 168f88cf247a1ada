"""`scripts/benchmark.py` measures what it says, on a tiny model. (No test asserts a time.)"""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from tiny import base_llama, random_ids, tiny_model

from infini_llama.cache_infini import InfiniCache
from infini_llama.scripts import benchmark, benchmark_memory, benchmark_report
from infini_llama.scripts.generate import InputError

RULES = ("delta", "linear")


@pytest.fixture(autouse=True)
def small_bandwidth_test(monkeypatch) -> None:
    """No test asserts a time, so none needs a tensor that no cache of a processor holds."""
    monkeypatch.setattr(benchmark, "BANDWIDTH_BYTES", 1 << 16)


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
    assert decode["read"] == {"7": 7, "32": 32} and decode["flatness"] >= 1
    floor = decode["floor"]
    weights = sum(x.nbytes for x in tiny_model().parameters())
    assert 0 < floor["bytes"]["ours"]["weights"] < weights  # without the embedding
    for name, parts in floor["bytes"].items():
        assert floor["s_per_token"][name] == sum(parts.values()) / floor["bandwidth"]["bytes_per_s"]
    assert floor["bytes"]["base"]["state"] == 0 < floor["bytes"]["ours"]["state"]
    # Places 3, 4, 5, 1, 2, 3 of five: as many keys are in view.
    assert floor["bytes"]["ours"]["keys_and_values"] == 3 * 2 * 2 * 2 * 8 * 4
    assert result["theory"]["ratio"] > 1 and result["segment_length"] == 5


def test_full_attention_is_measured_up_to_a_limit(folder, capsys) -> None:
    """In the same turns as ours, on the whole text, and named as how many times longer it takes; theory comes before."""
    sizes = ["--segments", "2", "4", "--repeats", "2", "--segment-length", "5", "--full-limit", "10"]
    assert benchmark.main([str(folder), "--tasks", "prefill", *sizes]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert [(row["tokens"], "full" in row) for row in result["prefill"]] == 2 * [(10, True)] + 2 * [(20, False)]
    row = result["prefill"][0]
    medians = row["full"]["full_s"]["median"], row["ours_s"]["median"]
    assert row["full"]["ratio_of_medians"] == medians[0] / medians[1]
    assert list(result["theory"]["full_over_ours"]) == ["10", "20"]
    assert 0 <= err.index("In theory") < err.index("full/ours")


def test_a_long_text_is_read_in_turn_with_short_ones(folder, capsys) -> None:
    """Windows of whole blocks, through one cache; all of them are in the result, and what those beside a text take."""
    sizes = [
        "--segments",
        "1",
        "--repeats",
        "2",
        "--segment-length",
        "5",
        "--block-segments",
        "2",
        "--rules",
        "linear",
    ]
    long = ["--long-length", "69", "--window", "25"]
    assert benchmark.main([str(folder), "--tasks", "prefill", *sizes, *long]) == 0
    result = json.loads(capsys.readouterr().out)["long"]
    assert (result["tokens"], result["window"], len(result["windows_tokens_per_s"])) == (60, 20, 3)
    assert result["rule"] == "delta" and result["long_over_short"] > 0 and result["end_over_start"] > 0
    first, _, last = result["windows_tokens_per_s"]  # of three windows these two have a text beside them
    short = sorted(result["short_tokens_per_s"][name] for name in ("min", "max"))
    ratios = result["pair_ratios"]
    assert {first / a for a in short} | {last / a for a in short} >= {ratios["min"], ratios["max"]}
    assert benchmark.main([str(folder), "--tasks", "prefill", *sizes, "--long-length", "20"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --long-length is 20: give at least two windows")


@torch.no_grad()
def test_a_cache_that_is_moved_on_computes_the_same() -> None:
    """What decoding after a very long context costs may be measured without reading it: only positions differ."""
    model = tiny_model()
    cache = InfiniCache(model.config)
    model(random_ids(1, 17), past_key_values=cache)
    moved = copy.deepcopy(cache)
    benchmark.move_on(moved, 2_000_000 * model.config.segment_length)
    assert moved.get_seq_length() == 10_000_017 and moved.nbytes == cache.nbytes
    ids = random_ids(1, 6)  # over the end of a segment
    logits = [model(ids, past_key_values=x).logits for x in (cache, moved)]
    assert torch.equal(*logits)
    assert moved.layers[0].timeline.filled == cache.layers[0].timeline.filled
    assert moved.layers[1].timeline.positions == (10_000_022,)


def test_layers_of_both_models_are_compiled_on_request(folder, monkeypatch) -> None:
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer: compiled.append(layer))
    sizes = ["--tasks", "prefill", "--segments", "2", "--repeats", "1", "--segment-length", "5"]
    for options, expected in (([], 0), (["--compile"], 2 * tiny_model().config.num_hidden_layers)):
        assert benchmark.main([str(folder), *sizes, *options]) == 0
        assert len(compiled) == expected
    assert {type(layer).__name__ for layer in compiled} == {"InfiniLlamaDecoderLayer", "LlamaDecoderLayer"}


def test_long_contexts_are_read_in_part(folder, capsys) -> None:
    """To the limit, and at least one segment, ending at the same place; the result says how much."""
    sizes = ["--contexts", "7", "10000002", "--tokens", "3", "--segment-length", "5"]
    assert benchmark.main([str(folder), "--tasks", "decode", *sizes, "--read-limit", "21"]) == 0
    assert json.loads(capsys.readouterr().out)["decode"]["read"] == {"7": 7, "10000002": 22}
    assert benchmark.main([str(folder), "--tasks", "decode", *sizes, "--read-limit", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["decode"]["read"] == {"7": 7, "10000002": 7}
    assert benchmark.main([str(folder), "--tasks", "decode", "--contexts", "7", "8", "--segment-length", "5"]) == 2
    assert "not at the same place in segments of 5 tokens" in capsys.readouterr().err.splitlines()[-1]


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


@pytest.mark.parametrize("true_value", [1, 2, 3, 100, 1000])
def test_the_largest_that_fits_is_found(true_value) -> None:
    """To a sixteenth, without trying far beyond it; a limit that fits is tried alone."""
    tried: list[int] = []

    def fits(count: int) -> bool:
        tried.append(count)
        return count <= true_value

    found = benchmark_memory.largest(fits)
    assert true_value - max(1, true_value // 16) < found <= true_value and max(tried) <= 2 * true_value
    tried.clear()
    assert benchmark_memory.largest(fits, limit=true_value) == true_value and tried == [true_value]
    assert benchmark_memory.largest(fits, limit=10 * true_value) <= true_value
    assert benchmark_memory.largest(lambda count: False) == benchmark_memory.largest(lambda count: False, limit=8) == 0


def longest_arguments(folder: Path, **changed) -> str:
    how = {"dtype": "float32", "checkpointing": True, "autocast": False, "optimizer_step": True}
    sizes = {"segment_length": 5, "block_segments": 2, "budget": 2 * 10**9, "tokens": 20, "system": "ours"}
    return json.dumps(how | sizes | {"model": str(folder)} | changed)


@pytest.mark.parametrize("system", ["ours", "base"])
def test_a_step_that_needs_more_than_the_budget_does_not_fit(tmp_path, system) -> None:
    """Its allocations fail, before the machine runs out; a short one fits, with its peak."""
    tiny_model(vocab_size=20_000).save_pretrained(tmp_path)
    child = benchmark_memory.in_process("longest", longest_arguments(tmp_path, system=system))
    assert child["fits"] and child["seconds"] > 0
    # One tensor of logits, of one block, is a third of what is left above the short step's peak.
    budget = int(child["peak_mb"] * 2**20) + 30 * 2**20
    sizes = {"tokens": 2500, "block_segments": 500, "budget": budget}
    child = benchmark_memory.in_process("longest", longest_arguments(tmp_path, system=system, **sizes))
    assert not child["fits"] and "budget" in child["why"]


def test_the_longest_text_is_searched_for_both_models(folder, capsys, monkeypatch) -> None:
    """The base by doubling, ours first at the most that is asked for; the result has every trial."""
    base_limit, trials = 30, []

    def trial(task: str, arguments: str, **environment: str) -> dict:
        wanted = json.loads(arguments)
        trials.append((wanted["system"], wanted["tokens"]))
        assert task == "longest" and wanted["budget"] == 10**7 and environment["OMP_NUM_THREADS"] == "1"
        assert wanted["autocast"] and wanted["checkpointing"] and wanted["segment_length"] == 5
        if wanted["system"] == "base" and wanted["tokens"] > base_limit:
            return {"fits": False, "why": "an allocation beyond the budget"}
        return {"fits": True, "peak_mb": 1.0, "seconds": 0.1}

    monkeypatch.setattr(benchmark_memory, "in_process", trial)
    options = ["--budget-gb", "0.01", "--times", "8", "--segment-length", "5", "--autocast", "--threads", "1"]
    assert benchmark.main([str(folder), "--tasks", "longest", *options]) == 0
    result = json.loads(capsys.readouterr().out)["longest"]
    assert result["longest_tokens"] == {"base": 30, "ours": 240} and result["is_at_least"]
    assert result["ours_over_base"] == 8 and trials[-1] == ("ours", 240)
    assert trials[:4] == [("base", 5), ("base", 10), ("base", 20), ("base", 40)]
    base_limit = 0
    assert benchmark.main([str(folder), "--tasks", "longest", *options]) == 2
    assert "does not hold a step over 5 tokens" in capsys.readouterr().err.splitlines()[-1]


def test_a_budget_beyond_what_is_free_is_refused(folder, capsys, monkeypatch) -> None:
    """The machine is not to run out of memory."""
    monkeypatch.setattr(benchmark_memory, "free_memory", lambda: 3 * 10**9)
    assert benchmark.main([str(folder), "--tasks", "longest", "--budget-gb", "4"]) == 2
    assert "--budget-gb is 4, but 3.0 GB are free" in capsys.readouterr().err.splitlines()[-1]


def a_result() -> dict:
    """One of every task, as `benchmark.json` holds it."""
    few = {"median": 2.0, "min": 1.0, "max": 3.0}
    against = {"ratio_of_medians": 1.25, "pair_ratios": few}
    row = {
        "segments": 4,
        "tokens": 8192,
        "rule": "delta",
        "ours_s": few,
        "tokens_per_s": 4096.0,
        "floor_s": few,
    } | against
    child = {"peak_mb": 300.0, "start_mb": 200.0, "ids_mb": 1.0, "activations_mb": 100.0, "seconds": 2.0, "fits": True}
    moved = {"weights": 10**8, "state": 10**6, "keys_and_values": 10**6}
    return {
        "model": "some-llama",
        "command": ["benchmark.py", "some-llama"],
        "date": "2026-01-02",
        "commit": "0123abc",
        "machine": "a machine, 2 cores, 2 threads, cpu",
        "versions": {"torch": "2.13.0"},
        "dtype": "float32",
        "segment_length": 2048,
        "block_length": 4096,
        "theory": {"floor": 5e6, "memory": 1e5, "ratio": 1.02, "full_over_ours": {"8192": 1.5}},
        "prefill": [row | {"full": {"full_s": few} | against}, row | {"tokens": 65536}],
        "long": {
            "tokens": 32768,
            "window": 16384,
            "rule": "delta",
            "windows_tokens_per_s": [900.0, 901.0],
            "short_tokens_per_s": few,
            "long_tokens_per_s": few,
            "pair_ratios": few,
            "long_over_short": 0.99,
            "end_over_start": 1.01,
        },
        "decode": {
            "tokens": 8,
            "segment_length": 2048,
            "read": {"2048": 2048, "10000384": 32768},
            "s_per_token": {"2048": few, "10000384": few, "base": few},
            "flatness": 1.01,
            "ours_over_base": 1.05,
            "completing_over_median": None,
            "completing_tokens": 0,
            "floor": {
                "bandwidth": {"sum": 1e10, "copy": 9e9, "bytes_per_s": 1e10},
                "bytes": {"ours": moved, "base": moved},
                "s_per_token": {"ours": 0.01, "base": 0.01},
            },
        },
        "train": [row | {"in_blocks": {"floor_s": few} | against}],
        "memory": {"lengths": {"32000": child, "1000000": child}, "long_over_short": 1.02},
        "train_memory": {"checkpointed": {"segments": {"8": child}, "long_over_short": 1.1}},
        "longest": {
            "budget_gb": 8.0,
            "longest_tokens": {"base": 4096, "ours": 131072},
            "ours_over_base": 32.0,
            "is_at_least": True,
            "tried": {"base": {"4096": child}, "ours": {"131072": child}},
            "dtype": "float32",
            "checkpointing": True,
            "block_segments": 1,
            "autocast": True,
            "optimizer_step": False,
        },
    }


def test_tables_say_what_was_measured_and_under_which_circumstances() -> None:
    """Every task has its table; every number its machine, versions, commit, command, and spread."""
    text = benchmark_report.tables(a_result())
    for words in (
        "a machine, 2 cores, 2 threads",
        "torch 2.13.0",
        "Commit 0123abc",
        "`benchmark.py some-llama`",
        "2026-01-02",
    ):
        assert words in text
    assert "| 8,192 | delta | 2.000 (1.000 to 3.000) | 4,096 | 1.250 (1.000 to 3.000) |" in text
    assert "| 65,536 | delta |" in text and "1.50 at 8,192 tokens times ours" in text
    assert "| 10,000,384 | 32,768 | 2000.00 (1000.00 to 3000.00) | 10.00 | 200.00 |" in text
    assert "at least 32.0 times as many" in text and "segments per block of ours: 1, float32 under bfloat16" in text
    assert text.count("\n## ") == 7


def test_the_page_is_made_from_results_alone(tmp_path, capsys) -> None:
    """One command, nothing is measured, in the order given; written anew it is the same."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "benchmark.json").write_text(json.dumps(a_result() | {"model": name}), encoding="utf-8")
    page = tmp_path / "performance.md"
    command = ["--page", str(page), "--results", str(tmp_path / "one"), str(tmp_path / "two")]
    assert benchmark.main(command) == 0
    text = page.read_text(encoding="utf-8")
    assert json.loads(capsys.readouterr().out)["page"] == str(page)
    assert text.startswith("# Performance\n") and text.index("## one, float32") < text.index("## two, float32")
    assert benchmark.main(command) == 0 and page.read_text(encoding="utf-8") == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "performance.md", "two"]


def test_a_run_leaves_its_results_in_a_folder_and_on_the_page(folder, tmp_path, capsys) -> None:
    """JSON as printed, tables, a picture; no path of this machine, nothing half written."""
    output, page = tmp_path / "runs" / "now", tmp_path / "page.md"
    sizes = ["--segments", "2", "--repeats", "1", "--contexts", "5", "--tokens", "2", "--segment-length", "5"]
    places = ["--output", str(output), "--page", str(page)]
    assert benchmark.main([str(folder), "--tasks", "prefill", "decode", *sizes, *places]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((output / "benchmark.json").read_text(encoding="utf-8")) == printed
    assert {path.name for path in output.iterdir()} == {"benchmark.json", "benchmark.md", "benchmark.png"}
    assert (output / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert page.read_text(encoding="utf-8").endswith(benchmark_report.tables(printed, level=2))
    assert str(tmp_path) not in page.read_text(encoding="utf-8") + json.dumps(printed)
    assert printed["seed"] == 0 and {"torch", "transformers"} == set(printed["versions"])


def test_without_matplotlib_there_is_no_picture(tmp_path, monkeypatch) -> None:
    """It is optional; with it, a picture of everything is whole or not there."""
    assert benchmark_report.plot(a_result(), tmp_path / "all.png") and os.listdir(tmp_path) == ["all.png"]
    monkeypatch.setattr(benchmark_report, "has_matplotlib", lambda: False)
    assert not benchmark_report.plot(a_result(), tmp_path / "none.png") and os.listdir(tmp_path) == ["all.png"]


def test_what_cannot_be_used_is_named_on_the_last_line(tmp_path, capsys, monkeypatch) -> None:
    """Status 2, the field, its value, and what to do."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    (tmp_path / "benchmark.json").write_text('{"versions": 1}', encoding="utf-8")
    here, nowhere = str(tmp_path), str(tmp_path / "nowhere")
    for arguments, words in {
        (): "MODEL is missing",
        (nowhere, "--tasks", "prefill"): "nowhere' has no config that can be read",
        ("--results", here): "--results has no effect without --page",
        ("--results", here, "--page", "x.md"): "has no benchmark.json that can be read",
        ("--results", nowhere, "--page", "x.md"): "has no benchmark.json that can be read",
    }.items():
        assert benchmark.main(list(arguments)) == 2
        out, err = capsys.readouterr()
        assert not out and err.splitlines()[-1].startswith("error: ") and words in err.splitlines()[-1]
    with pytest.raises(InputError, match="--output '.*file' cannot be"):
        benchmark.save(a_result(), str(tmp_path / "file"))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 8}', encoding="utf-8")
    with pytest.raises(InputError, match="cannot be loaded"):
        benchmark.load_pair(here, torch.float32, "cpu")
    monkeypatch.setattr(benchmark_memory, "limit_memory", lambda budget: None)  # this process goes on
    assert "cannot be loaded" in benchmark_memory.longest_child(longest_arguments(tmp_path))["error"]
