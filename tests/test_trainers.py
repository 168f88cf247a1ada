"""The ecosystem's own trainers, unpatched: Transformers' Trainer, TRL, PEFT, and torch's data parallelism."""

import copy
import dataclasses
import functools
import math
import shutil
from pathlib import Path

import pytest
import torch
from test_modeling import enable_checkpointing, gates_of, loss_and_gradients
from test_remote_code import HIDE_THE_PACKAGE, run_in_fresh_process
from tiny import VOCAB_SIZE, random_ids, tiny_config, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from infini_llama.modeling_infini import InfiniLlamaForCausalLM

N = tiny_config().segment_length
LONG = 7 * N + 3  # three blocks of segments, and an open segment
# float32 sums in another order: measured up to 5e-7 on losses of 4, and 2e-6 on the logits of merged weights.
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
# The same operations on the same numbers.
assert_equal = functools.partial(torch.testing.assert_close, rtol=0, atol=0)
# Transformers 5.22 renamed it.
ARGUMENTS = {field.name for field in dataclasses.fields(TrainingArguments)}
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in ARGUMENTS else "gradient_checkpointing"


def arguments(folder: Path, cls: type[TrainingArguments] = TrainingArguments, **settings) -> TrainingArguments:
    """Arguments for a run that logs every step and writes nothing but what it is asked to."""
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
    return cls(str(folder), **quiet | settings)


def logged(trainer: Trainer, key: str) -> list[float]:
    return [log[key] for log in trainer.state.log_history if key in log]


def copy_of(model: torch.nn.Module) -> InfiniLlamaForCausalLM:
    """Another model with the same weights, whatever is done to the first one later."""
    twin = InfiniLlamaForCausalLM(copy.deepcopy(model.config)).eval()
    twin.load_state_dict(model.state_dict())
    return twin


# Transformers' Trainer


def unequal_texts() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": random_ids(length)} for length in (LONG, 23, 12, N)]


def padded_batch(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.masked_fill(ids == 0, -100)}


@pytest.mark.parametrize("checkpoints", [False, True])
def test_the_trainer_trains_evaluates_and_saves(checkpoints, tmp_path):
    """On texts of unequal length: finite losses, gates that move, a checkpoint that loads, and predictions without the
    cache in them.
    """
    model, texts = tiny_model(), unequal_texts()
    gates = [gate.clone() for gate in gates_of(model)]
    settings = arguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=2,
        **{CHECKPOINTING: checkpoints},
    )
    trainer = Trainer(model, settings, train_dataset=texts, eval_dataset=texts, data_collator=padded_batch)
    trainer.train()
    losses = logged(trainer, "loss") + logged(trainer, "eval_loss")
    assert len(losses) == 4 and all(map(math.isfinite, losses))
    assert losses[3] < losses[2]  # the evaluation after two steps and after one
    assert all((now != before).any() for now, before in zip(gates_of(model), gates))
    loaded = InfiniLlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert_equal(loaded.state_dict(), model.state_dict())
    assert trainer.predict(texts).predictions.shape == (4, LONG, VOCAB_SIZE)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_the_trainers_metrics_see_the_logits_of_its_loss(checkpoints, tmp_path):
    """A metric that computes the loss from logits and labels agrees with `eval_loss`, after training with checkpoints
    too; with `prediction_loss_only` the loss is the same and no logits are kept.
    """

    def cross_entropy(prediction) -> dict[str, float]:
        logits, labels = map(torch.from_numpy, (prediction.predictions, prediction.label_ids))
        return {"cross_entropy": F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:]).item()}

    texts = unequal_texts()
    settings = {"max_steps": 1, "per_device_eval_batch_size": 4, CHECKPOINTING: checkpoints}
    data = {"train_dataset": texts, "eval_dataset": texts, "data_collator": padded_batch}
    trainer = Trainer(tiny_model(), arguments(tmp_path, **settings), compute_metrics=cross_entropy, **data)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_cross_entropy"] == pytest.approx(metrics["eval_loss"], rel=1e-5)  # a float32 mean, twice

    trainer = Trainer(trainer.model, arguments(tmp_path, prediction_loss_only=True, **settings), **data)
    prediction = trainer.predict(texts)
    assert prediction.predictions is None
    assert prediction.metrics["test_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_the_trainers_loss_counts_targets_over_accumulated_batches(checkpoints, tmp_path):
    """Four texts of unequal length give the same loss and gradient as one batch of four and as four batches of one."""
    texts, model, logs = unequal_texts(), tiny_model(), []
    for batch_size in (4, 1):
        settings = arguments(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=4 // batch_size,
            **{CHECKPOINTING: checkpoints},
        )
        trainer = Trainer(copy_of(model), settings, train_dataset=texts, data_collator=padded_batch)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    # The Trainer adds up four float32 losses that each are divided by the number of all targets.
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-5)
    assert logs[0]["grad_norm"] == pytest.approx(logs[1]["grad_norm"], rel=1e-5)


class LearningRates(TrainerCallback):
    """The learning rate of every group in every step."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.seen.append([group["lr"] for group in optimizer.optimizer.param_groups])


def trainer_with_groups(model: torch.nn.Module, folder: Path, **settings) -> Trainer:
    """Six steps with checkpoints of both kinds: of activations, and every two steps on the disk."""
    texts = unequal_texts()
    settings = arguments(
        folder,
        max_steps=6,
        per_device_train_batch_size=2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        **{CHECKPOINTING: True} | settings,
    )
    optimizer = torch.optim.AdamW(model.parameter_groups(learning_rate=1e-3, gate_learning_rate=0.1))
    return Trainer(
        model,
        settings,
        train_dataset=texts,
        eval_dataset=texts,
        data_collator=padded_batch,
        optimizers=(optimizer, None),
    )


def test_the_trainers_schedule_scales_the_rate_of_gates_from_its_own_base(tmp_path):
    """With the optimizer of `parameter_groups` every group's rate falls from its own value, and the gates go further
    than the rate of the other parameters could take them.
    """
    model, rates = tiny_model(), LearningRates()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = trainer_with_groups(model, tmp_path)
    trainer.add_callback(rates)
    trainer.train()
    linear = [1 - step / 6 for step in range(6)]
    assert_close(torch.tensor(rates.seen), torch.tensor([[1e-3 * x, 1e-3 * x, 0.1 * x] for x in linear]))

    moved = {name: (p.detach() - before[name]).abs() for name, p in model.named_parameters()}
    # AdamW's steps are at most (1 - beta1) / sqrt(1 - beta2) times the rate.
    reach = sum(rate for rate, *_ in rates.seen) * 0.1 / math.sqrt(0.001)
    assert all((x > 0).any() for x in moved.values())
    assert max(x.max() for name, x in moved.items() if "memory_gate" not in name) < reach
    assert all(x.max() > 5 * reach for name, x in moved.items() if "memory_gate" in name)


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path):
    """From the checkpoint of step 2 the same losses, weights and rates follow as if the run had never stopped."""
    whole, start = tiny_model(), tiny_model()  # the second one's own weights must not matter
    uninterrupted = trainer_with_groups(whole, tmp_path / "whole")
    uninterrupted.train()
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "resumed/checkpoint-2")
    resumed = trainer_with_groups(start, tmp_path / "resumed")
    resumed.train_dataset = uninterrupted.train_dataset
    resumed.eval_dataset = uninterrupted.eval_dataset
    resumed.train(resume_from_checkpoint=True)
    assert_equal(start.state_dict(), whole.state_dict())
    for key in ("loss", "eval_loss", "learning_rate"):
        assert logged(resumed, key) == logged(uninterrupted, key)
    assert [g["lr"] for g in resumed.optimizer.param_groups] == [g["lr"] for g in uninterrupted.optimizer.param_groups]


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    """`load_best_model_at_end` brings every weight back, gates too. The "best" loss is the highest, of the first step."""
    model = tiny_model()
    settings = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = trainer_with_groups(model, tmp_path, **settings)
    trainer.train()
    losses = logged(trainer, "eval_loss")
    assert losses[0] > losses[1] > losses[2]
    best = InfiniLlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    last = InfiniLlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-6").state_dict()
    assert all((best[name] != last[name]).any() for name in best)
    assert_equal(model.state_dict(), best)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0], rel=1e-6)


# TRL


# TRL turns checkpointing on, by the name that Transformers deprecated.
with_trl = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word: `<pad>`, `<eos>`, `w2`, `w3`, ..."""
    words = ["<pad>", "<eos>"] + [f"w{i}" for i in range(2, VOCAB_SIZE)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def sft_trainer(model: torch.nn.Module, texts: list[str], folder: Path, **settings):
    """`trl.SFTTrainer`; `peft_config` and `optimizers` go to it, the other settings to `SFTConfig`."""
    reason = "TRL's trainer needs TRL, which brings Datasets"
    trl, datasets = (pytest.importorskip(name, reason=reason) for name in ("trl", "datasets"))
    own = {name: settings.pop(name) for name in ("peft_config", "optimizers") if name in settings}
    return trl.SFTTrainer(
        model,
        arguments(folder, trl.SFTConfig, **settings),
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=word_tokenizer(),
        **own,
    )


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def periodic_texts() -> list[str]:
    return [words([2 + (start + i) % 7 for i in range(length)]) for start in range(4) for length in (11, 23, 34)]


@with_trl
@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_packed_documents_do_not_leak_into_each_other(strategy, checkpoints, tmp_path):
    """Loss and gradients of TRL's own packed batch are those of its documents, each alone in our own forward; without
    the positions that restart, they would not be.
    """
    model, lengths = tiny_model(), (3, 17, 6, 28, 11, 9, 38, 45, 1)
    alone = copy_of(model).train()
    texts = [words(torch.randint(2, VOCAB_SIZE, (length,)).tolist()) for length in lengths]
    packing = {"packing": True, "packing_strategy": strategy, "max_length": 40, "per_device_train_batch_size": 2}
    settings = {"bf16": False, CHECKPOINTING: checkpoints}
    trainer = sft_trainer(model, texts, tmp_path, max_steps=1, **packing, **settings)
    if checkpoints:
        enable_checkpointing(model)
    model.train()
    documents_seen = []
    for batch in trainer.get_train_dataloader():
        ids, starts = batch["input_ids"][0], (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        documents = [ids[None, start:stop] for start, stop in zip(starts, [*starts[1:], len(ids)])]
        documents_seen += [document.shape[1] for document in documents]
        total = sum(document.shape[1] - 1 for document in documents)
        alone.zero_grad()
        expected = torch.tensor(0.0)
        for document in documents:
            if (targets := document.shape[1] - 1) > 0:
                loss = alone(document, labels=document).loss * targets / total
                loss.backward()
                expected += loss.detach()

        model.zero_grad()
        loss = trainer.compute_loss(model, dict(batch))
        loss.backward()
        assert_close(loss, expected)
        gradients = {name: p.grad for name, p in model.named_parameters()}
        assert_close(gradients, {name: p.grad for name, p in alone.named_parameters()})
        if len(documents) > 1:
            as_one_text = {name: batch[name] for name in ("input_ids", "labels")}
            as_one_text["attention_mask"] = torch.ones_like(ids[None])
            assert (trainer.compute_loss(model, as_one_text) - expected).abs() > 0.01
    whole = [length + 1 for length in lengths]  # with <eos>
    cut = {"bfd": [40], "bfd_split": [40, 6]}[strategy]
    assert sorted(documents_seen) == sorted([length for length in whole if length <= 40] + cut)


@with_trl
@pytest.mark.parametrize("checkpoints", [False, True])
def test_the_fused_head_of_trl_gives_our_loss_and_gradients(checkpoints):
    """TRL replaces our forward by one that asks the base model for hidden states. On padded rows of several blocks it
    gives the loss and gradients of ours; and ours, which it keeps for everything else, is unchanged.
    """
    utils = pytest.importorskip("trl.trainer.utils", reason="the fused head is TRL's")
    model, batch = tiny_model(), padded_batch(unequal_texts())
    ours = copy_of(model).train()
    utils.add_fused_lm_head(model.train())
    if checkpoints:
        enable_checkpointing(model)

    def gradients_of(model: torch.nn.Module, **options) -> dict[str, torch.Tensor]:
        out = model(**batch, **options)
        out.loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        return {"loss": out.loss.detach()} | gradients

    for num_items in (None, 50):
        expected = gradients_of(ours, num_items_in_batch=num_items)
        assert_close(gradients_of(model, num_items_in_batch=num_items, fused_lm_head=True), expected)
        assert_close(gradients_of(model, num_items_in_batch=num_items), expected)


KINDS_OF_SFT = {
    "padded": {},
    "packed bfd": {"packing": True, "packing_strategy": "bfd"},
    "packed bfd_split": {"packing": True, "packing_strategy": "bfd_split"},
    "packed wrapped": {"packing": True, "packing_strategy": "wrapped"},
}


@with_trl
@pytest.mark.parametrize("kind", KINDS_OF_SFT)
def test_sft_trains_with_its_default_settings(kind, tmp_path):
    """The loss is finite and falls, with TRL's bfloat16 and checkpoints, padded and packed in each of its ways."""
    model = tiny_model()
    settings = {"max_steps": 8, "per_device_train_batch_size": 4, "max_length": 40, "learning_rate": 1e-2}
    trainer = sft_trainer(model, periodic_texts(), tmp_path, **settings, **KINDS_OF_SFT[kind])
    assert trainer.args.bf16 and getattr(trainer.args, CHECKPOINTING)
    gates = [gate.clone() for gate in gates_of(model)]
    trainer.train()
    losses = logged(trainer, "loss")
    assert len(losses) == 8 and all(map(math.isfinite, losses))
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert all((now != before).any() for now, before in zip(gates_of(model), gates))


# PEFT


# PEFT asks Transformers for it by its old name.
with_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def lora():
    """(PEFT, the configuration of an adapter that has the gates in it)."""
    peft = pytest.importorskip("peft", reason="adapters need PEFT, the extra `train`")
    return peft, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["memory_gate"])


def train_adapter(model: torch.nn.Module, ids: torch.Tensor) -> None:
    """Two steps, because LoRA's B starts at 0, so that its A moves in the second one only."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@with_peft
def test_an_adapter_carries_the_gates(tmp_path):
    """LoRA with `modules_to_save=["memory_gate"]` trains the gates beside the adapter, with checkpoints too; saved and
    loaded on the bare model it gives the same logits, merged too, and switched off it leaves the bare model.
    """
    bare, ids = tiny_model(), random_ids(2, LONG)
    other = copy_of(bare)
    with torch.no_grad():
        bare_logits = bare(ids).logits
    peft, config = lora()
    model = peft.get_peft_model(bare, config).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert sum("memory_gate" in name for name in before) == 2
    train_adapter(model, ids)
    assert all((p != before[name]).any() for name, p in model.named_parameters() if p.requires_grad)

    expected = loss_and_gradients(model, input_ids=ids)
    enable_checkpointing(bare)
    assert_close(loss_and_gradients(model, input_ids=ids), expected)

    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
        with model.disable_adapter():
            assert_equal(model(input_ids=ids).logits, bare_logits)
        model.save_pretrained(tmp_path)
        assert_equal(peft.PeftModel.from_pretrained(other, tmp_path).eval()(input_ids=ids).logits, logits)
        merged = model.merge_and_unload()
        assert type(merged) is InfiniLlamaForCausalLM
        assert_close(merged(input_ids=ids).logits, logits)
        merged.save_pretrained(tmp_path / "merged")
        assert_equal(InfiniLlamaForCausalLM.from_pretrained(tmp_path / "merged").state_dict(), merged.state_dict())


@with_peft
def test_the_groups_of_an_adapter_are_its_own_parameters_and_the_gates():
    """Through a `PeftModel`, `parameter_groups` has every trainable parameter once and nothing frozen: LoRA's matrices at
    one rate, the trainable copies of the gates at theirs. `gate_statistics` is that of the copies.
    """
    peft, config = lora()
    model = peft.get_peft_model(tiny_model(), config)
    matrices, gates = model.parameter_groups(learning_rate=1e-3)
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    names = [[trained[id(p)] for p in group["params"]] for group in (matrices, gates)]
    assert len(names[0]) == 2 * 2 * 2 and all("lora_" in name for name in names[0])
    assert len(names[1]) == 2 and all("memory_gate.modules_to_save." in name for name in names[1])
    assert (matrices["lr"], gates["lr"]) == (1e-3, 0.01)
    assert sorted(sum(names, [])) == sorted(trained.values())

    before = model.gate_statistics()
    with torch.no_grad():
        for gate in gates["params"]:
            gate.fill_(2.0)
    assert set(model.gate_statistics().values()) == {torch.tensor(2.0).sigmoid().item()}
    with model.disable_adapter():
        assert model.gate_statistics() == before


@with_peft
@with_trl
def test_sft_trains_an_adapter_with_the_gates_in_it(tmp_path):
    """`peft_config` with `modules_to_save=["memory_gate"]`: adapter and gates move, nothing else does, and what the
    trainer saves gives the same logits on the bare model.
    """
    model, ids = tiny_model(), random_ids(2, LONG)
    bare, (peft, config) = copy_of(model), lora()
    # In bfloat16, Accelerate would leave autocast on the model.
    settings = {"packing": True, "max_length": 40, "learning_rate": 1e-2, "max_steps": 3, "bf16": False}
    settings |= {"per_device_train_batch_size": 2, "save_strategy": "steps"}
    trainer = sft_trainer(model, periodic_texts(), tmp_path / "run", peft_config=config, **settings)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert all(map(math.isfinite, logged(trainer, "loss")))
    for name, p in trainer.model.named_parameters():
        trained = "lora_" in name or "memory_gate.modules_to_save" in name
        assert p.requires_grad == trained and (p != before[name]).any() == trained, name
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids).logits
        loaded = peft.PeftModel.from_pretrained(bare, tmp_path / "run/checkpoint-3").eval()
        assert_equal(loaded(input_ids=ids).logits, expected)


@with_peft
@with_trl
def test_sft_gives_the_gates_of_an_adapter_their_own_rate(tmp_path):
    """A `PeftModel` and the optimizer of its `parameter_groups`, both made before the trainer, go through it as they are."""
    peft, config = lora()
    model = peft.get_peft_model(tiny_model(), config)
    groups = model.parameter_groups(learning_rate=1e-3, gate_learning_rate=0.1)
    settings = {"packing": True, "max_length": 40, "max_steps": 2, "per_device_train_batch_size": 2}
    trainer = sft_trainer(model, periodic_texts(), tmp_path, optimizers=(torch.optim.AdamW(groups), None), **settings)
    gates = [gate.clone() for gate in gates_of(model)]
    trainer.train()
    moved = [(now - before).abs().max() for now, before in zip(gates_of(model), gates)]
    # Rates of 0.1 and 0.05: the first step of Adam is its rate. The frozen gates stay.
    assert all(x > 0.1 if gate.requires_grad else x == 0 for x, gate in zip(moved, gates_of(model)))


STANDS_ALONE = f"""{HIDE_THE_PACKAGE}
import torch
from transformers import AutoModelForCausalLM

root = sys.argv[1]
expected = torch.load(root + "/expected.pt")
for folder in ("merged", "checkpoint-1"):
    model = AutoModelForCausalLM.from_pretrained(root + "/" + folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), model
    with torch.no_grad():
        # The same operations on the same numbers, with another number of threads perhaps.
        torch.testing.assert_close(model(expected["ids"]).logits, expected[folder], rtol=1e-4, atol=1e-4)
assert "infini_llama" not in sys.modules
"""


@with_peft
def test_a_merged_adapter_and_a_checkpoint_of_the_trainer_stand_alone(tmp_path):
    """Where `infini_llama` cannot be imported, both load with `trust_remote_code` and give the logits they gave here."""
    ids = random_ids(2, LONG)
    peft, config = lora()
    adapted = peft.get_peft_model(tiny_model(), config)
    train_adapter(adapted, ids)
    merged = adapted.merge_and_unload().eval()
    merged.save_pretrained(tmp_path / "merged")
    model = tiny_model()
    settings = arguments(tmp_path, max_steps=1, learning_rate=1e-2, save_strategy="steps")
    Trainer(model, settings, train_dataset=unequal_texts(), data_collator=padded_batch).train()
    with torch.no_grad():
        expected = {"ids": ids, "merged": merged(ids).logits, "checkpoint-1": model.eval()(ids).logits}
    torch.save(expected, tmp_path / "expected.pt")
    run_in_fresh_process(STANDS_ALONE, tmp_path / "home", tmp_path)


# Data parallelism


# Two forks of one process that has imported everything and computed nothing.
IN_TWO_PROCESSES = """
import os, sys
from datetime import timedelta
import torch
from torch import distributed
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments
from infini_llama.modeling_infini import InfiniLlamaForCausalLM

def gradients(rank, folder, cases):
    found = []
    for checkpoints, overrides, steps in cases:
        model = InfiniLlamaForCausalLM.from_pretrained(folder + "/model", **overrides).train()
        if checkpoints:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        parallel = DistributedDataParallel(model)
        for texts in steps:
            model.zero_grad()
            parallel(texts[rank], labels=texts[rank]).loss.backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    return found

def weights_of_trainer(rank, folder, texts):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    model = InfiniLlamaForCausalLM.from_pretrained(folder + "/model")
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 1}
    settings |= {"use_cpu": True, "report_to": [], "save_strategy": "no"}
    arguments = TrainingArguments(folder, **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = Trainer(model, arguments, train_dataset=texts, optimizers=(optimizer, None))
    assert arguments.world_size == 2
    trainer.train()
    return model.state_dict()

def work(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/rendezvous", timedelta(seconds=60), 2, rank)
    inputs = torch.load(folder + "/inputs.pt")
    found = gradients(rank, folder, inputs["cases"]), weights_of_trainer(rank, folder, inputs["texts"])
    torch.save(found, f"{folder}/found-{rank}.pt")
    distributed.destroy_process_group()

start_processes(work, sys.argv[1:], nprocs=2, start_method="fork")
"""


@pytest.mark.slow
def test_training_in_two_processes_is_training_in_one(tmp_path):
    """`DistributedDataParallel` as it is by default, which fails where a parameter has no gradient: texts shorter than a
    segment, whose gates read nothing, in one process or both; several blocks, with checkpoints; memory switched off. And
    a step of the Trainer, which counts the targets of both processes.
    """
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    short, long = random_ids(2, 1, 3), random_ids(2, 1, LONG)
    steps = [(short[0], short[1]), (short[0], long[1]), (long[0], short[1])]
    cases = [(False, {}, steps), (True, {}, steps), (False, {"memory_update": "none"}, steps)]
    texts = [{"input_ids": text[0], "labels": text[0]} for text in (*short, *long)]
    torch.save({"cases": cases, "texts": texts}, tmp_path / "inputs.pt")
    run_in_fresh_process(IN_TWO_PROCESSES, tmp_path / "home", tmp_path)
    ranks = [torch.load(tmp_path / f"found-{rank}.pt") for rank in range(2)]
    assert_equal(*ranks)
    gradients, weights = ranks[0]

    expected = []
    for _, overrides, steps in cases:
        one = InfiniLlamaForCausalLM.from_pretrained(tmp_path / "model", **overrides).train()
        for pair in steps:
            sum(one(text, labels=text).loss / 2 for text in pair).backward()
            expected.append({name: p.grad for name, p in one.named_parameters()})
            one.zero_grad()
    assert_close(gradients, expected)

    settings = arguments(tmp_path, max_steps=1, per_device_train_batch_size=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    data = {"train_dataset": texts, "data_collator": padded_batch}
    Trainer(model, settings, optimizers=(optimizer, None), **data).train()
    assert_close(weights, model.state_dict())
