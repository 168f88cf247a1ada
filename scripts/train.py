"""Train an InfiniLlama on long texts and on retrieval tasks, with Accelerate.

    python scripts/train.py scripts/recipes/passkey.yaml --model ./infini --output ./trained
    python scripts/train.py --model ./infini --output ./trained --data books/ --sequence_length 32768 --max_steps 1000
    accelerate launch --config_file scripts/launch/fsdp2.yaml scripts/train.py RECIPE --model ./infini --output ./trained
    python scripts/train.py RECIPE --model ./infini --output ./trained --resume true

RECIPE is a YAML file whose keys are the options below; options on the command line override it. MODEL is a folder that
`scripts/convert.py` made, or a Hub id of such a model. What can stand in `--data` is described in
`scripts/training_data.py`: text files, folders, Hub datasets, and retrieval tasks, each with a weight. On the command
line an entry is a path, a Hub id, or a JSON object: `--data books/ '{"task": "passkey", "weight": 0.5}'`.

Sequences are trained whole, with exact gradients through the memory, unless `--detach_segments` says otherwise. Their
length may grow during training (`--sequence_length 192 384 768`), after a number of steps or when the loss has fallen.
With *state passing* sequences start from the memory of other, longer text, and those of a document from that of what
comes before, so that the model sees memories as full as those that it will meet later, and inputs stay short.

OUTPUT gets `model/` (or `adapter/` and, merged, `model/`) at the end, `checkpoints/`, `log.jsonl` with one line per
step, and the files of the tracker. Checkpoints are complete and appear whole: a run that was killed at any moment goes
on with `--resume true`, and its losses are those of a run that was not.

The last line on stdout is one JSON document; everything else goes to stderr. The exit status is 0, or 2 when something
in the input, or a loss that is no number, stops the run.
"""

import copy
import dataclasses
import json
import math
import os
import random
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, get_scheduler

from infini_llama.cache_infini import InfiniCache
from infini_llama.configuration_infini import InfiniLlamaConfig
from infini_llama.memory_infini import MemoryState
from infini_llama.modeling_infini import InfiniLlamaForCausalLM
from infini_llama.scripts.evaluation_tasks import bucket, bucket_label
from infini_llama.scripts.generate import InputError, adapter_config, compile_layers, load_model, one_line, say
from infini_llama.scripts.training_data import Batch, Mixture
from infini_llama.scripts.training_options import FREE_ON_RESUME, TrainingOptions, parse_options
from infini_llama.timeline_infini import Timeline

__all__ = ["Training", "main"]


# The loss


def weighted_causal_loss(
    logits: torch.Tensor,
    labels: None,
    vocab_size: int,
    num_items_in_batch: int,
    shift_labels: torch.Tensor,
    shift_weights: torch.Tensor,
    **kwargs,
) -> torch.Tensor:
    """Sum of weight times cross entropy over (batch, tokens), divided by `num_items_in_batch`."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), shift_labels.flatten(), reduction="none")
    return (losses * shift_weights.flatten().to(losses.dtype)).sum() / num_items_in_batch


# State passing


SCALE_GROWTH = 1.25  # of `state_passing_scale`, a stage of the curriculum


class CarriedMemory:
    """The memory of a text that grows without gradient, from which sequences start (arXiv 2507.02782).

    Of a task, whose samples go on from any of them, it keeps of each length that is twice another what it was last, so that
    memories of all lengths are at hand at any time, when it has once grown to the largest. A text goes on from where its
    memory ends.

    Args:
        model: that reads.
        max_tokens: the largest length, after which another text is begun.
        is_task: whose haystack it reads.
    """

    def __init__(self, model: InfiniLlamaForCausalLM, max_tokens: int, is_task: bool = True):
        self.config, self.max_tokens, self.is_task = model.config, max_tokens, is_task
        self.tokens = self.grown_at = 0
        self.document: tuple[int, ...] | None = None
        self.cache: InfiniCache | None = None
        self.kept: dict[int, InfiniCache] = {}  # by the bits of the number of tokens

    def begin(self) -> None:
        """Go on with another text."""
        self.cache, self.tokens = InfiniCache(self.config), 0

    @torch.no_grad()
    def extend(self, model: torch.nn.Module, text: torch.LongTensor, length: int) -> None:
        """Read (1, tokens) more, `length` at a time."""
        for piece in text.split(length, dim=1):
            model(input_ids=piece, past_key_values=self.cache, use_cache=False, logits_to_keep=1)
            self.tokens += length
            if not self.is_task:
                self.kept.clear()
            self.kept[self.tokens.bit_length()] = copy.deepcopy(self.cache)

    def rows(self, num_rows: int, rng: random.Random, max_scale: float) -> InfiniCache:
        """A copy, for a batch, of any of the kept memories; each row times a factor from 1 to `max_scale`, drawn evenly on
        a logarithmic scale.

        c M and c z are what `linear` remembers of c copies of the text; so are they for `delta`, once what is read back
        has settled. That is how a text of minutes stands for one of hours.
        """
        cache = copy.deepcopy(self.kept[rng.choice(sorted(self.kept))])
        cache.batch_repeat_interleave(num_rows)
        scale = torch.tensor([max_scale ** rng.random() for _ in range(num_rows)], device=cache.layers[0].device)
        for layer in cache.layers:
            if layer.memory is not None:  # as it is where `memory_update` is "none"
                matrix, normalizer = layer.memory
                # The normalizer is a vector for each head, or a matrix.
                matrix, normalizer = (x * scale.view(-1, *[1] * (x.ndim - 1)) for x in (matrix, normalizer))
                layer.memory = MemoryState(matrix, normalizer)
        return cache

    def state_dict(self) -> dict[str, Any]:
        kept = {bits: _state_of(cache) for bits, cache in self.kept.items()}
        return {"tokens": self.tokens, "grown_at": self.grown_at, "document": self.document, "kept": kept}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.tokens, self.grown_at, self.document = state["tokens"], state["grown_at"], state["document"]
        for bits, layers in state["kept"].items():
            self.kept[bits] = cache = InfiniCache(self.config)
            for layer, (tensors, timeline, written_with) in zip(cache.layers, layers, strict=True):
                layer.set_state([None if x is None else x.to(device) for x in tensors], Timeline(*timeline))
                layer.written_with = tuple(written_with)
        # The one that grows is the one that it was kept as; what another process holds stays empty here.
        self.cache = copy.deepcopy(self.kept.get(self.tokens.bit_length()))


def _state_of(cache: InfiniCache) -> list[tuple]:
    return [(layer.state(), tuple(layer.timeline), layer.written_with) for layer in cache.layers]


# Training


class Training:
    """A run: `Training(options).run()`.

    What it is at any moment is in the model, the optimizer and its schedule, the carried memories, the place in the data and
    a few counters, all of which a checkpoint has.
    """

    def __init__(self, options: TrainingOptions):
        self.options = options
        self.output = Path(options.output)
        require_writable(self.output)
        if latest_checkpoint(self.output) and not options.resume:
            raise InputError(
                f"output '{self.output}' has checkpoints of a run already: go on with `--resume true`, or name another"
            )
        if (self.output / "model").exists() and not latest_checkpoint(self.output):
            raise InputError(f"output '{self.output}' has a 'model' already, which would be replaced: name another")
        precision = options.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", default_precision())
        self.accelerator = Accelerator(
            mixed_precision=precision,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            log_with=None if options.report_to == "none" else options.report_to,
            project_config=ProjectConfiguration(project_dir=str(self.output), logging_dir=str(self.output)),
        )
        if getattr(self.accelerator, "is_fsdp2", False) and self.accelerator.mixed_precision != "no":
            # Accelerate's policy also rounds the loss, its weights, and sums of gradients.
            fsdp = self.accelerator.state.fsdp_plugin
            fsdp.mixed_precision_policy = dataclasses.replace(
                fsdp.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
            )
        self.say = say if self.accelerator.is_main_process else lambda message: None
        set_seed(options.seed)
        model, self.tokenizer = build_model(options)
        self.segment_length = model.config.segment_length
        options.check_lengths(self.segment_length)
        self.mixture = Mixture(options.data, self.tokenizer, self.segment_length, options.seed)
        if options.eval_data:
            for mixture in self.evaluation_mixture():  # bad input shows now, not after a day
                for length in options.eval_length or [max(options.sequence_length)]:
                    mixture.next(1, length)
        if options.activation_checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.loss_function = weighted_causal_loss
        if options.has_adapter:
            model = add_adapter(model, options)
        self.infini_model = model.get_base_model() if options.has_adapter else model
        if options.torch_compile:
            compile_layers(self.infini_model)
        optimizer = torch.optim.AdamW(
            model.parameter_groups(
                options.learning_rate, options.weight_decay, gate_learning_rate=options.gate_learning_rate
            ),
            betas=(0.9, options.adam_beta2),
        )
        self.scheduler = get_scheduler(
            options.lr_scheduler_type, optimizer, options.warmup_steps, num_training_steps=options.max_steps
        )
        if self.accelerator.state.deepspeed_plugin is not None:
            if options.detach_segments is not None:
                raise InputError("`detach_segments` does not work with DeepSpeed, which steps at each backward pass")
            # DeepSpeed asks for a batch size, and uses it for nothing that matters here.
            deepspeed = self.accelerator.state.deepspeed_plugin.deepspeed_config
            deepspeed["train_micro_batch_size_per_gpu"] = 1
            deepspeed["gradient_clipping"] = options.max_grad_norm  # which it does itself
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.accelerator.register_for_checkpointing(self.scheduler)

        self.step = self.stage = self.stage_start = self.tokens = 0
        self.window: deque[float] = deque(maxlen=options.advance_window)
        self.memories: dict[str, CarriedMemory] = {}
        self.log_path = self.output / "log.jsonl"

    def run(self) -> dict[str, Any]:
        """Train to the end, and return the report."""
        options, accelerator = self.options, self.accelerator
        if options.resume:
            self.resume()
        if accelerator.is_main_process:
            keep_log_until(self.log_path, self.step)
            for remains in (self.output / "checkpoints").glob("*.unfinished"):
                shutil.rmtree(remains)
            if accelerator.log_with:
                accelerator.init_trackers("tracker", config=flat_options(options))
        parameters = sum(p.numel() for p in self.infini_model.parameters())
        trained = sum(p.numel() for p in self.infini_model.parameters() if p.requires_grad)
        self.say(
            f"{parameters / 1e6:.1f} million parameters, {trained / 1e6:.2f} million trained; "
            f"N = {self.segment_length}, {accelerator.num_processes} process(es), mixed precision: {accelerator.mixed_precision}"
        )
        evaluation = None
        progress = tqdm(
            initial=self.step,
            total=options.max_steps,
            unit="step",
            dynamic_ncols=True,
            disable=not accelerator.is_main_process,
        )
        with progress:
            while self.step < options.max_steps:
                record = self.train_step()
                progress.set_postfix_str(
                    f"loss {record['loss']:.3f}, {record['sequence_length'] // self.segment_length} segments, "
                    f"{record['tokens_per_second']:,.0f} tokens/s"
                )
                progress.update()
                is_last = self.step == options.max_steps
                if is_last or (options.eval_steps and self.step % options.eval_steps == 0):
                    evaluation = self.evaluate()
                    if evaluation:
                        record["evaluation"] = evaluation
                self.log(record)
                if options.save_steps and (is_last or self.step % options.save_steps == 0):
                    self.save()
        if evaluation is None:  # resumed at the end
            evaluation = self.evaluate()
        self.export()
        gates = gate_summary(self.infini_model)
        accelerator.wait_for_everyone()  # nobody leaves while another writes
        accelerator.end_training()
        last = read_log(self.log_path)[-options.advance_window :]
        return {
            "steps": self.step,
            "tokens": self.tokens,
            "sequence_length": self.sequence_length,
            "loss": sum(record["loss"] for record in last) / max(1, len(last)),
            "gates": gates,
            "evaluation": evaluation,
            "skipped_documents": self.mixture.skipped_documents,
            "output": str(self.output),
        }

    @property
    def sequence_length(self) -> int:
        lengths = self.options.sequence_length
        return lengths[min(self.stage, len(lengths) - 1)]

    @property
    def state_passing_scale(self) -> float:
        """By how much carried memories are multiplied at most: it grows once sequences do not any more."""
        growth = max(0, self.stage + 1 - len(self.options.sequence_length))
        return min(self.options.state_passing_scale, SCALE_GROWTH**growth)

    # One step

    def train_step(self) -> dict[str, Any]:
        """Forward passes, backward passes and one step of the optimizer; returns what is to be logged."""
        options, accelerator = self.options, self.accelerator
        started, length, scale = time.perf_counter(), self.sequence_length, self.state_passing_scale
        num_rows = max(1, options.batch_tokens // length)
        self.model.train()
        losses = {name: [0.0, 0] for name in self.mixture.sources}
        for index in range(options.gradient_accumulation_steps):
            batch, cache = self.next_batch(num_rows, length, index)
            with accelerator.accumulate(self.model):
                loss = self.forward_backward(batch, cache)
                losses[batch.source][0] += loss
                losses[batch.source][1] += 1
                self.require_finite("loss", loss, batch.source)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.model.parameters(), options.max_grad_norm)
                    norm = self.optimizer_norm() if norm is None else float(norm)
                    self.require_finite("gradient norm", norm, batch.source)
                self.optimizer.step()
                self.optimizer.zero_grad()
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scheduler.step()
        sums = accelerator.reduce(torch.tensor(list(losses.values()), device=accelerator.device), "sum").tolist()
        means = {name: total / count for name, (total, count) in zip(losses, sums) if count}
        tokens = num_rows * length * options.gradient_accumulation_steps * accelerator.num_processes
        self.step, self.tokens = self.step + 1, self.tokens + tokens
        record = {
            "step": self.step,
            "loss": sum(total for total, _ in sums) / sum(count for _, count in sums),
            "losses": means,
            "sequence_length": length,
            "state_passing_scale": scale,
            "tokens": self.tokens,
            "learning_rate": rates[0],
            "gate_learning_rate": rates[-1],
            "gradient_norm": norm,
            "seconds": time.perf_counter() - started,
        }
        record["tokens_per_second"] = tokens / record["seconds"]
        self.advance(means)
        return record

    def forward_backward(self, batch: Batch, cache: InfiniCache | None) -> float:
        """The loss of a batch, and its gradients; in spans if backpropagation is truncated."""
        num_rows, length = batch.input_ids.shape
        span = length
        if self.options.detach_segments is not None:
            span = min(length, self.options.detach_segments * self.segment_length)
            if cache is None and span < length:
                cache = InfiniCache(self.infini_model.config)
        shift_labels = F.pad(batch.labels[:, 1:], (0, 1), value=-100)
        shift_weights = F.pad(batch.loss_weights[:, 1:], (0, 1))
        total = 0.0
        for start in range(0, length, span):
            part = slice(start, start + span)
            is_last = start + span >= length
            # Gradients of several processes are joined once, after the last span.
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                loss = self.model(
                    input_ids=batch.input_ids[:, part],
                    position_ids=batch.position_ids[:, part],
                    past_key_values=cache if cache is None else cache.detach_(),
                    use_cache=False,
                    shift_labels=shift_labels[:, part].contiguous(),
                    shift_weights=shift_weights[:, part].contiguous(),
                    num_items_in_batch=num_rows,
                ).loss
                self.accelerator.backward(loss)
            total += loss.item()
        return total

    def next_batch(self, num_rows: int, length: int, index: int) -> tuple[Batch, InfiniCache | None]:
        """This process's share of the next batches, and the memory that its rows start from."""
        accelerator = self.accelerator
        device, mine, anyone_reads = accelerator.device, None, False
        for rank in range(accelerator.num_processes):
            rng = random.Random(f"{self.options.seed}/memory/{self.step}/{index}/{rank}")
            continued = rng.random() < self.options.state_passing
            source = self.mixture.next_source()
            memory, text = self.carry(source, num_rows, length, rank) if continued else (None, None)
            batch = self.mixture.next(num_rows, length, source=source, continued=continued)
            anyone_reads |= text is not None
            if rank == accelerator.process_index:
                mine = batch, memory, text
        batch, memory, text = mine
        if text is not None:
            memory.extend(self.model, text.to(device), length)
        elif anyone_reads:
            # A forward pass is a matter of all processes: FSDP gathers parameters in it, and DDP broadcasts buffers.
            nothing = batch.input_ids[:1].repeat(1, self.options.state_passing_growth).to(device)
            CarriedMemory(self.infini_model, length).extend(self.model, nothing, length)
        positions = batch.position_ids
        # With a cache the last block is computed twice, and FSDP asks all processes to do the same.
        cache = InfiniCache(self.infini_model.config) if self.options.state_passing else None
        if memory is not None:
            # The first piece of each row goes on where the memory ends; what follows are other documents.
            is_first = (positions == torch.arange(length)).cumprod(dim=1).bool()
            cache = memory.rows(num_rows, rng, self.state_passing_scale)
            positions = torch.where(is_first, positions + cache.get_seq_length(), positions)
        tensors = batch.input_ids, positions, batch.labels, batch.loss_weights
        return Batch(batch.source, *(x.to(device) for x in tensors)), cache

    def carry(
        self, source: str, num_rows: int, length: int, rank: int
    ) -> tuple[CarriedMemory, torch.LongTensor | None]:
        """The memory that a batch of this source goes on from, and the text that it is to read now, if it is time.

        For a text it is that of the document so far, but for what was trained on and what other processes read; the rows of
        the batch come after it, one after another. Every process draws the texts of all, so that their places in the
        sources agree, and reads its own.
        """
        key = f"{source}/{rank}"
        memory = self.memories.setdefault(key, self.carried_memory(source))
        growth, ahead = length * self.options.state_passing_growth, length * num_rows
        is_due = self.step - memory.grown_at >= self.options.state_passing_every
        document = self.mixture.document(source, room=growth + ahead if is_due else ahead)
        goes_on = document is not None and document == memory.document
        if goes_on and not is_due:
            return memory, None
        is_new = not goes_on or memory.tokens + growth > memory.max_tokens
        if is_new:
            memory.begin()
        memory.grown_at = self.step
        text = self.mixture.filler(source, growth, start=is_new, ahead=ahead)
        memory.document = self.mixture.document(source)
        if rank != self.accelerator.process_index:
            memory.tokens += growth
        return memory, text

    def carried_memory(self, source: str) -> CarriedMemory:
        is_task = self.mixture.sources[source].is_task
        return CarriedMemory(self.infini_model, self.options.state_passing_tokens, is_task)

    def require_finite(self, name: str, value: float, source: str) -> None:
        if not math.isfinite(value):
            checkpoint = latest_checkpoint(self.output)
            after = (
                f"the last checkpoint, '{checkpoint.name}', is kept" if checkpoint else "there is no checkpoint yet"
            )
            raise InputError(
                f"{name} is {value} in step {self.step + 1}, in a batch of '{source}'; {after}. Begin "
                "another run with a lower `learning_rate` or `gate_learning_rate`, or with more `warmup_steps`, or look for "
                "broken text in that source"
            )

    def optimizer_norm(self) -> float:
        """DeepSpeed clips by itself, and knows the norm."""
        norm = getattr(self.model, "get_global_grad_norm", lambda: None)()
        return 0.0 if norm is None else float(norm)

    def advance(self, losses: dict[str, float]) -> None:
        """Go to the next stage of the curriculum when it is time."""
        options = self.options
        is_last = self.stage >= len(options.sequence_length) - 1
        if is_last and self.state_passing_scale == options.state_passing_scale:
            return
        tasks = {name: loss for name, loss in losses.items() if self.mixture.sources[name].is_task}
        if tasks or not any(source.is_task for source in self.mixture.sources.values()):
            self.window.extend((tasks or losses).values())
        if options.stage_steps:
            is_over = self.step - self.stage_start >= options.stage_steps[self.stage]
        else:
            is_full = len(self.window) == options.advance_window
            is_over = is_full and sum(self.window) / len(self.window) < options.advance_below
        if is_over:
            self.stage, self.stage_start = self.stage + 1, self.step
            self.window.clear()

    # Evaluation

    def evaluation_mixture(self) -> list[Mixture]:
        """One mixture per source: each evaluation sees the same sequences."""
        entries = [{"source": e} if isinstance(e, str) else e for e in self.options.eval_data]
        entries = [e | {"context_loss": 0} if "task" in e else e for e in entries]
        return [Mixture([e], self.tokenizer, self.segment_length, self.options.seed + 1) for e in entries]

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Memory on and off: exact answers of tasks, loss of texts by the number of completed segments.

        Returns:
            source -> length -> "on", "off" -> numbers.
        """
        options, accelerator = self.options, self.accelerator
        config, results = self.infini_model.config, {}
        self.model.eval()
        rule = config.memory_update
        for mixture in self.evaluation_mixture() if options.eval_data else []:
            (name,) = mixture.sources
            for length in options.eval_length or [max(options.sequence_length)]:
                rows = [mixture.next(1, length) for _ in range(options.eval_sequences)]
                rows += rows[:1] * (-len(rows) % accelerator.num_processes)  # every process has as many
                for switch in ("on", "off") if rule != "none" else ("off",):
                    config.memory_update = rule if switch == "on" else "none"
                    try:
                        mine = [
                            self.score(row) for row in rows[accelerator.process_index :: accelerator.num_processes]
                        ]
                    finally:
                        config.memory_update = rule
                    scores = accelerator.gather(torch.stack(mine))
                    # Gathered process by process; what was added at the end is dropped.
                    order = torch.arange(len(rows)).view(-1, accelerator.num_processes).T.flatten()
                    scores = scores[order.argsort()][: options.eval_sequences].cpu()
                    rows_seen = rows[: options.eval_sequences]
                    if mixture.sources[name].is_task:
                        numbers = task_numbers(scores)
                    else:
                        numbers = text_numbers(scores, rows_seen, self.segment_length)
                    results.setdefault(name, {}).setdefault(str(length), {})[switch] = numbers
        return results

    def score(self, batch: Batch) -> torch.Tensor:
        """Per target of one row, its loss and whether it is the likeliest token, NaN elsewhere; (2, tokens), float32."""
        device, length = self.accelerator.device, batch.input_ids.shape[1]
        cache, parts = InfiniCache(self.infini_model.config), []
        targets = F.pad(batch.labels[:, 1:], (0, 1), value=-100).to(device)
        span = self.infini_model.config.block_length
        for start in range(0, length, span):
            part = slice(start, start + span)
            logits = self.model(
                input_ids=batch.input_ids[:, part].to(device),
                position_ids=batch.position_ids[:, part].to(device),
                past_key_values=cache,
            ).logits.float()
            target = targets[0, part]
            losses = F.cross_entropy(logits[0], target, reduction="none")
            parts.append(torch.stack([losses, (logits[0].argmax(-1) == target).float()]))
        return torch.cat(parts, dim=1).masked_fill(targets == -100, math.nan)

    # Logs and checkpoints

    def log(self, record: dict[str, Any]) -> None:
        """One line in the log, and what the tracker shows."""
        if self.accelerator.is_main_process:
            with open(self.log_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        if self.step % self.options.logging_steps == 0 or "evaluation" in record:
            values = flatten({key: value for key, value in record.items() if key != "step"})
            self.accelerator.log(values | self.infini_model.gate_statistics(), step=self.step)

    def save(self) -> None:
        """A checkpoint with all that the rest of the run depends on, which appears whole or not at all."""
        accelerator = self.accelerator
        target = self.output / "checkpoints" / f"step-{self.step}"
        unfinished = target.with_name(target.name + ".unfinished")
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(unfinished))
        own = {key: m.state_dict() for key, m in self.memories.items()}
        torch.save(own, unfinished / f"memories-{accelerator.process_index}.pt")
        if accelerator.is_main_process:
            state = {
                "step": self.step,
                "stage": self.stage,
                "stage_start": self.stage_start,
                "tokens": self.tokens,
                "window": list(self.window),
                "mixture": self.mixture.state_dict(),
                "num_processes": accelerator.num_processes,
                "options": dataclasses.asdict(self.options),
            }
            (unfinished / "training.json").write_text(json.dumps(state), encoding="utf-8")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            for file in [*unfinished.rglob("*"), unfinished]:
                sync_to_disk(file)
            shutil.rmtree(target, ignore_errors=True)
            unfinished.rename(target)
            sync_to_disk(target.parent)
            for old in checkpoints(self.output)[: -self.options.save_total_limit]:
                doomed = old.with_name(old.name + ".unfinished")
                shutil.rmtree(doomed, ignore_errors=True)
                old.rename(doomed)
                shutil.rmtree(doomed)
        accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Take on the last checkpoint, if there is one."""
        checkpoint = latest_checkpoint(self.output)
        if checkpoint is None:
            self.say(f"No checkpoint in '{self.output}' yet: the run begins at step 0")
            return
        with readable(checkpoint):
            state = json.loads((checkpoint / "training.json").read_text(encoding="utf-8"))
        now, then = dataclasses.asdict(self.options), state["options"]
        for name, value in now.items():
            if name not in FREE_ON_RESUME and then.get(name) != value:
                raise InputError(
                    f"`{name}` is {value!r}, but the checkpoint '{checkpoint}' is of a run with {then.get(name)!r}: set "
                    "it back, or begin another run in another output"
                )
        if state["num_processes"] != self.accelerator.num_processes:
            raise InputError(
                f"there are {self.accelerator.num_processes} processes, but the checkpoint '{checkpoint}' is of a run with "
                f"{state['num_processes']}: start as many, or begin another run in another output"
            )
        with readable(checkpoint):
            self.accelerator.load_state(str(checkpoint))
            own = torch.load(checkpoint / f"memories-{self.accelerator.process_index}.pt", weights_only=True)
        for name in ("step", "stage", "stage_start", "tokens"):
            setattr(self, name, state[name])
        self.window.extend(state["window"])
        self.mixture.load_state_dict(state["mixture"])
        for key, memory in own.items():
            self.memories[key] = self.carried_memory(key.rpartition("/")[0])
            self.memories[key].load_state_dict(memory, self.accelerator.device)
        self.say(f"Going on from '{checkpoint}'")

    def export(self) -> None:
        """Write the trained model, and the adapter if there is one, as folders that load by themselves."""
        accelerator = self.accelerator
        weights = accelerator.get_state_dict(self.model)
        if not accelerator.is_main_process:
            return
        dtype = getattr(torch, self.options.export_dtype)
        model = accelerator.unwrap_model(self.model)
        if self.options.has_adapter:
            weights = rounded(weights, dtype)
            with whole_folder(self.output / "adapter") as folder:
                model.save_pretrained(folder, state_dict=weights)
            # Another model than the trained one, which FSDP has cut into pieces.
            model = add_adapter(build_model(self.options)[0], self.options)
            model.load_state_dict(weights)
            model = model.merge_and_unload()
            weights = model.state_dict()
        # Gathered from pieces, what is tied is there twice.
        weights = {name: x for name, x in weights.items() if name not in model.all_tied_weights_keys}
        with whole_folder(self.output / "model") as folder:
            # The config gets the model's dtype.
            model.to(dtype).save_pretrained(folder, state_dict=rounded(weights, dtype))
            self.tokenizer.save_pretrained(folder)


def default_precision() -> str:
    """bf16, and float32 on a CPU without instructions for it, where products in bf16 take many times as long."""
    if torch.accelerator.is_available() or not hasattr(torch.cpu, "get_capabilities"):  # older torch cannot tell
        return "bf16"
    able = torch.cpu.get_capabilities()
    return "bf16" if any(able.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16")) else "no"


def rounded(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights in `dtype`, but for the gates of equation 10, which are float32 in any model."""
    return {name: x if "memory_gate" in name else x.to(dtype) for name, x in weights.items()}


def build_model(options: TrainingOptions) -> tuple[InfiniLlamaForCausalLM, PreTrainedTokenizerBase]:
    """Model with float32 weights, and tokenizer."""
    settings = {name: getattr(options, name) for name in ("segment_length", "memory_update", "block_segments")}
    settings |= {name: getattr(options, name) or None for name in ("write_gate", "read_gate")}
    if not options.from_scratch:
        model, tokenizer = load_model(options.model, dtype="float32", **settings)
    else:
        try:
            config = AutoConfig.from_pretrained(options.model)
            if not isinstance(config, InfiniLlamaConfig):
                raise ValueError(f"it is a {config.model_type}: convert it first, with scripts/convert.py")
            tokenizer = AutoTokenizer.from_pretrained(options.model)
            for name, value in settings.items():
                if value is not None:
                    setattr(config, name, value)
            model = InfiniLlamaForCausalLM(config)
        except (OSError, ValueError) as error:
            raise InputError(f"model '{options.model}' cannot be built ({one_line(error)})") from error
    if options.state_passing_scale > 1 and model.config.memory_update == "least_squares":
        raise InputError(
            f"state_passing_scale is {options.state_passing_scale}, but a memory of `least_squares` does not grow with the "
            "text: leave it out, or choose another memory_update"
        )
    if options.gate_init is not None:
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.memory_gate.bias.fill_(options.gate_init)
    return model, tokenizer


def add_adapter(model: InfiniLlamaForCausalLM, options: TrainingOptions) -> torch.nn.Module:
    """LoRA on the projections, and the gates themselves; a new one, or one that is there."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    gates = ["memory_gate", "write_gate"] if model.config.write_gate else ["memory_gate"]
    if options.adapter is not None:
        try:
            config = adapter_config(model, options.adapter)
            own = {f"base_model.model.{name}": x for name, x in model.state_dict().items() if "_gate." in name}
            weights = load_peft_weights(options.adapter, device="cpu")
            if own.keys() <= weights.keys():
                return PeftModel.from_pretrained(model, options.adapter, is_trainable=True, config=config)
            # An adapter from before the model had all of its gates goes on with those of the model.
            config.modules_to_save, config.inference_mode = gates, False
            adapted = get_peft_model(model, config)
            set_peft_model_state_dict(adapted, own | weights)
            return adapted
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise InputError(f"`adapter` '{options.adapter}' cannot be loaded ({one_line(error)})") from error
    lora = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha or 2 * options.lora_rank,
        target_modules=options.lora_target_modules,
        modules_to_save=gates,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise InputError(f"`lora_target_modules` {options.lora_target_modules}: {one_line(error)}") from error


# Numbers


def task_numbers(scores: torch.Tensor) -> dict[str, float]:
    """Of (rows, 2, tokens): share of rows whose whole answer is right (that greedy decoding gives it), and the loss."""
    loss, right = scores.unbind(1)
    return {"exact": (right.nan_to_num(1.0).amin(1)).mean().item(), "loss": loss.nanmean().item()}


def text_numbers(scores: torch.Tensor, rows: list[Batch], segment_length: int) -> dict[str, Any]:
    """Of (rows, 2, tokens): mean loss, and the mean after 0, 1, 2-3, 4-7, ... completed segments of the document."""
    losses = scores[:, 0]
    segments = torch.cat([row.position_ids for row in rows]) // segment_length
    buckets = segments.clone().apply_(bucket)
    by_segments = {
        bucket_label(index): losses[buckets == index].nanmean().item()
        for index in buckets[~losses.isnan()].unique().tolist()
    }
    return {"loss": losses.nanmean().item(), "perplexity": losses.nanmean().exp().item(), "by_segments": by_segments}


def gate_summary(model: InfiniLlamaForCausalLM) -> dict[str, float]:
    statistics = model.gate_statistics()
    return {
        "mean": statistics["gates/mean"],
        "min": min(value for name, value in statistics.items() if name.endswith("/min")),
        "max": max(value for name, value in statistics.items() if name.endswith("/max")),
    }


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return flat


def flat_options(options: TrainingOptions) -> dict[str, Any]:
    values = dataclasses.asdict(options)
    return {k: v if isinstance(v, (int, float, str, bool)) else json.dumps(v) for k, v in values.items()}


# Files


def require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"output '{folder}' cannot be written ({error.strerror}): name another folder") from error


def checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints, the oldest first."""
    found = [path for path in (output / "checkpoints").glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def latest_checkpoint(output: Path) -> Path | None:
    return next(reversed(checkpoints(output)), None)


@contextmanager
def readable(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each of the libraries that read its files has errors of its own
        raise InputError(
            f"checkpoint '{checkpoint}' cannot be read ({one_line(error)}): remove it, to go on from the one before it"
        ) from error


def sync_to_disk(path: Path) -> None:
    """A file or a folder's entries are on the disk when this returns, also if the power fails."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Records of the log; a last line that a killed run left unfinished is not one."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def keep_log_until(path: Path, step: int) -> None:
    """Drop the steps that will be done again."""
    if not path.exists():
        return
    kept = [json.dumps(record) + "\n" for record in read_log(path) if record["step"] <= step]
    temporary = path.with_name(path.name + ".unfinished")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name when it is full; a former one of that name is then replaced."""
    unfinished = target.with_name(target.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)


def main(argv: list[str] | None = None) -> int:
    try:
        report = Training(parse_options(argv, __doc__)).run()
    except (InputError, ValueError, FileNotFoundError) as error:
        say(f"error: {error}")
        return 2
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(report))
    return 0


if __name__ == "__main__":
    status = main()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Everything is written. Threads of gloo, which FSDP's meshes keep alive, now and then abort or hang a process while
        # its interpreter shuts down, and the launcher takes that for a failed run.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
