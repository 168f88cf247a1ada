"""From sources to training batches: texts and retrieval tasks, mixed by weight.

    mixture = Mixture(["books/", {"task": "passkey", "weight": 0.5}], tokenizer, segment_length=64, seed=0)
    batch = mixture.next(num_rows=2, length=4096)

A source is a dict; a string is short for `{"source": string}`.

| field of a text | default | meaning |
| --- | --- | --- |
| `source` | | a file, a folder (its files, and those of its folders), a glob, or a dataset's Hub id |
| `weight` | 1 | how often a batch is of this source, relative to the others |
| `name` | the source | in `Batch.source` and in the state |
| `split`, `config` | `"train"`, none | of a Hub dataset |
| `column` | `"text"` | that holds the documents |
| `streaming` | false | read while training, in the dataset's own order, instead of downloading first |
| `min_tokens` | 2 | shorter documents are left out |

Files are .txt (each is one document), .jsonl, .json, .csv or .parquet, of one kind in a source, and may be gzipped.

| field of a task | default | meaning |
| --- | --- | --- |
| `task` | | `"passkey"`, `"needle"`, `"babilong"` or `"copy"`, see `scripts/retrieval_tasks.py`, whose options are fields here |
| `weight`, `name` | 1, the task | as above |
| `context_loss` | 0.1 | weight of the loss of all that is not the answer, together; the answer's is 1 |
| `haystack` | none | prose for `needle` and `babilong`: a text as above; of a large one, the first million tokens |

A text is a stream of tokens: its documents one after another, each with the tokens that the tokenizer begins texts
with and an end-of-text token, in an order that is drawn anew for each epoch (unless it is streamed). The rows of a
batch are the next tokens of the stream, so nothing is padded, dropped or repeated. The part of a document that is in
one row is a *piece*; positions restart at each, so that the model gives it an empty memory. Rows that go on from a
memory are of a second such stream, in another order, which that memory reads as well.

Everything is drawn from the seed and from counters, which are the state: the same seed gives the same batches, and a
mixture that loads a state goes on exactly where it was saved.
"""

import copy
import glob
import inspect
import math
import random
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from infini_llama.scripts.retrieval_tasks import TASKS, RetrievalTask, opening_ids, plain_ids

__all__ = ["Batch", "Mixture"]

# What reads the files of each kind, and how.
READERS = {
    ".txt": ("text", {"sample_by": "document", "encoding": "utf-8-sig"}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".parquet": ("parquet", {}),
}
TEXT_DEFAULTS = {"split": "train", "config": None, "column": "text", "streaming": False, "min_tokens": 2}
HAYSTACK_TOKENS = 1 << 20
NO_TARGET = -100


@dataclass(frozen=True)
class Batch:
    """Rows of one source.

    Args:
        source: its name.
        input_ids: (rows, length).
        position_ids: (rows, length); they restart at 0 with each piece of a document.
        labels: (rows, length), the input ids, -100 where there is no target: at the first token of a piece, and
            outside the answer of a task without `context_loss`. Not shifted; the model does that.
        loss_weights: (rows, length) float32, the factor of the loss of predicting that token, 0 without a target.
            Those of a text are 1 / (length - 1), so that every target counts the same.
    """

    source: str
    input_ids: torch.LongTensor
    position_ids: torch.LongTensor
    labels: torch.LongTensor
    loss_weights: torch.FloatTensor


class Mixture:
    """Batches from weighted sources, see the top of this file.

    Args:
        specs: the sources.
        tokenizer: of the model.
        segment_length: of the model; lengths are multiples of it.
        seed: of everything that is drawn.

    Raises:
        ValueError, FileNotFoundError: a source cannot be used; the message says which, why, and the remedy.
    """

    def __init__(
        self, specs: list[dict[str, Any] | str], tokenizer: PreTrainedTokenizerBase, segment_length: int, seed: int
    ):
        if not specs:
            raise ValueError("there are no sources: give at least one text or task")
        self.segment_length, self.seed = segment_length, seed
        self.sources: dict[str, _Text | _Task] = {}
        self.weights: list[float] = []
        self.batches = 0
        for spec in specs:
            spec = _as_dict(spec)
            if ("source" in spec) == ("task" in spec):
                raise ValueError(f"source and task of {spec}: give one of these two fields")
            name = str(spec.get("name", spec.get("source", spec.get("task"))))
            if name in self.sources:
                raise ValueError(f"name {name!r} is there twice: give each source a `name` of its own")
            self.weights.append(_number(name, "weight", spec.get("weight", 1.0), positive=True))
            kind = _Text if "source" in spec else _Task
            self.sources[name] = kind(name, spec, tokenizer, segment_length, f"{seed}/{name}")

    @property
    def skipped_documents(self) -> dict[str, int]:
        """How many documents of each text were left out so far for being too short, counted anew in each epoch."""
        return {name: source.rows.skipped for name, source in self.sources.items() if isinstance(source, _Text)}

    def next_source(self) -> str:
        """Draw the name of the source that the next batch is of."""
        rng = random.Random(f"{self.seed}/batch/{self.batches}")
        self.batches += 1
        return rng.choices(list(self.sources), self.weights)[0]

    def next(self, num_rows: int, length: int, *, source: str | None = None, continued: bool = False) -> Batch:
        """Return the next batch, all of one source.

        Args:
            num_rows: sequences.
            length: tokens of each, a multiple of the segment length.
            source: its name, which `next_source` has drawn; None draws it.
            continued: the rows will go on from a memory of `filler` of their source: those of a text are what comes after
                it, samples of a task have no intro. The caller shifts positions, those before the first restart: what
                follows there is another document.
        """
        if num_rows < 1:
            raise ValueError(f"num_rows is {num_rows}: give at least 1")
        self._require_segments(length)
        name = self.next_source() if source is None else source
        rows = [self._source(name).row(length, continued) for _ in range(num_rows)]
        return Batch(name, *map(torch.stack, zip(*rows)))

    def filler(self, source: str, length: int, start: bool, ahead: int = 0) -> torch.LongTensor:
        """Return the next tokens (1, length) to read into a memory, before batches that are `continued`.

        A text has a place of its own for this. From there come tokens of one document, if it has enough left, or
        else those from the start of the next document on. A task gives its haystack.

        Args:
            source: its name.
            length: a multiple of the segment length.
            start: whether the memory is empty so far: a task then begins with its intro. Texts do not care.
            ahead: how many more tokens the same document should have, for the batch that goes on from there.
        """
        self._require_segments(length)
        return self._source(source).filler(length, start, ahead)[None]

    def document(self, source: str, room: int = 0) -> tuple[int, ...] | None:
        """Return what tells the document that `filler` is in from others; None if it has not been begun, or has fewer than
        `room` tokens left. A task is one document.
        """
        return self._source(source).document(room)

    def _source(self, name: str) -> "_Text | _Task":
        if name not in self.sources:
            raise ValueError(f"source {name!r} is not one of {', '.join(self.sources)}: name one of them")
        return self.sources[name]

    def state_dict(self) -> dict[str, Any]:
        """Return where the mixture stands, in what JSON can hold."""
        return {"batches": self.batches, "sources": {name: s.state_dict() for name, s in self.sources.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a mixture of the same sources, seed and tokenizer was saved."""
        if set(state["sources"]) != set(self.sources):
            raise ValueError(
                f"the state is of the sources {', '.join(state['sources'])}, not of {', '.join(self.sources)}: "
                "give the sources that it was saved with"
            )
        self.batches = state["batches"]
        for name, source in self.sources.items():
            source.load_state_dict(copy.deepcopy(state["sources"][name]))

    def _require_segments(self, length: int) -> None:
        if length < 1 or length % self.segment_length:
            raise ValueError(
                f"length is {length}: give a positive multiple of the segment length {self.segment_length}"
            )


# Texts


class _Text:
    """A text as a source: a stream for the rows of batches, and one for what is read into memories."""

    is_task = False

    def __init__(self, name: str, spec: dict, tokenizer: PreTrainedTokenizerBase, segment_length: int, seed: str):
        _require_known(name, spec, {"source", "weight", "name", *TEXT_DEFAULTS})
        self.rows = _Stream(name, spec, tokenizer, seed)
        self.fillers = self.rows.in_another_order("filler")

    def row(self, length: int, continued: bool) -> tuple[torch.Tensor, ...]:
        pieces = (self.fillers if continued else self.rows).read(length)
        ids = torch.cat(pieces)
        positions = torch.cat([torch.arange(len(piece)) for piece in pieces])
        is_target = positions > 0
        weights = is_target / max(length - 1, 1)
        return ids, positions, ids.where(is_target, NO_TARGET), weights

    def filler(self, length: int, start: bool, ahead: int) -> torch.Tensor:
        if self.fillers.offset > 0 and self.document(length + ahead) is None:
            self.fillers.leave_document()
        return torch.cat(self.fillers.read(length))

    def document(self, room: int) -> tuple[int, ...] | None:
        stream = self.fillers
        return (stream.epoch, stream.index) if stream.offset > 0 and stream.tokens_left() >= room else None

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows.state_dict(), "fillers": self.fillers.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows.load_state_dict(state["rows"])
        self.fillers.load_state_dict(state["fillers"])


class _Stream:
    """The tokens of a text's documents, one after another, without an end. It holds one document at a time."""

    def __init__(self, name: str, spec: dict, tokenizer: PreTrainedTokenizerBase, seed: str, bare: bool = False):
        spec = TEXT_DEFAULTS | spec
        self.name, self.column, self.tokenizer, self.seed = name, spec["column"], tokenizer, seed
        self.min_tokens = max(_number(name, "min_tokens", spec["min_tokens"], positive=True), 2)
        self.dataset = _load(name, spec)
        ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.before, self.after = ([], []) if bare else (opening_ids(tokenizer), ends)
        self.skipped = 0
        self._enter_epoch(0)

    def in_another_order(self, use: str) -> "_Stream":
        """Return a stream of the same documents, at their start."""
        other = copy.copy(self)
        other.seed = f"{self.seed}/{use}"
        other._enter_epoch(0)
        return other

    def _enter_epoch(self, epoch: int, index: int = 0, place: dict | None = None) -> None:
        self.epoch, self.index, self.offset = epoch, index, 0
        self.document: torch.Tensor | None = None
        # Only documents that were used, or come after such, can follow each other forever.
        self.is_usable = index > 0
        if isinstance(self.dataset, IterableDataset):
            # The dataset keeps the place of its one iterator, and any later iterator starts from a state that was
            # loaded: so each pass through it gets a copy.
            self.passage = copy.deepcopy(self.dataset)
            if place is not None:
                self.passage.load_state_dict(place)
            self.place = self.passage.state_dict() if place is None else place
            self.documents: Iterator[dict[str, Any]] = iter(self.passage)
        else:
            generator = torch.Generator().manual_seed(random.Random(f"{self.seed}/{epoch}").getrandbits(63))
            self.place = None
            order = torch.randperm(len(self.dataset), generator=generator)
            self.documents = (self.dataset[int(i)] for i in order[index:])

    def leave_document(self) -> None:
        """Go to the end of the document that is being read, if there is one."""
        if self.document is not None:
            self.index, self.offset, self.document = self.index + 1, 0, None
            self.place = None if self.place is None else self.passage.state_dict()

    def _open_document(self) -> torch.Tensor:
        """Return the document that is being read, or else the next one that is long enough."""
        while self.document is None:
            row = self._next_row()
            if row is None:
                if not self.is_usable:
                    raise ValueError(
                        f"source {self.name!r} has no document of at least {self.min_tokens} tokens in its column "
                        f"{self.column!r}: name another source or column"
                    )
                self._enter_epoch(self.epoch + 1)
                continue
            ids = plain_ids(self.tokenizer, self._text(row))
            self.document = torch.tensor([*self.before, *ids, *self.after], dtype=torch.long)
            if len(ids) < self.min_tokens:
                self.skipped += 1
                self.leave_document()
            else:
                self.is_usable = True
        return self.document

    def _next_row(self) -> dict[str, Any] | None:
        try:
            return next(self.documents, None)
        except Exception as error:  # streaming: whatever the library of the file's kind, or the network, raises
            raise _unreadable(self.name, error) from error

    def _text(self, row: dict[str, Any]) -> str:
        _require_column(self.name, self.column, list(row))
        text = row[self.column]
        if not isinstance(text, str):
            raise ValueError(
                f"document {self.index} of source {self.name!r} is no string but {type(text).__name__} in column "
                f"{self.column!r}: name another column, or mend the data"
            )
        return text

    def tokens_left(self) -> int:
        """Tokens of the document that is being read."""
        return len(self._open_document()) - self.offset

    def read(self, length: int) -> list[torch.Tensor]:
        """Return the next tokens, each document's (T,) by itself."""
        pieces = []
        while length > 0:
            piece = self._open_document()[self.offset : self.offset + length]
            pieces.append(piece)
            length -= len(piece)
            self.offset += len(piece)
            if self.tokens_left() == 0:
                self.leave_document()
        return pieces

    def read_epoch(self, limit: int) -> list[int]:
        """Return the tokens of all documents, or of the first that have `limit` tokens."""
        ids: list[int] = []
        while len(ids) < limit and self._open_document() is not None and self.epoch == 0:
            ids += self.document.tolist()
            self.leave_document()
        return ids[:limit]

    def state_dict(self) -> dict[str, Any]:
        fields = ("epoch", "index", "offset", "skipped", "place")
        return {field: copy.deepcopy(getattr(self, field)) for field in fields}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._enter_epoch(state["epoch"], state["index"], state["place"])
        self.offset, self.skipped = state["offset"], state["skipped"]


def _load(name: str, spec: dict[str, Any]) -> Dataset | IterableDataset:
    """Open the dataset of a text."""
    source, column = str(spec["source"]), spec["column"]
    files = _find_files(source)
    try:
        if files is None:
            dataset = load_dataset(source, spec["config"], split=spec["split"], streaming=spec["streaming"])
        else:
            if spec["config"] is not None:
                warnings.warn(f"config of source {name!r} has no effect: its data is here", stacklevel=4)
            reader, options = READERS[_kind(files[0])]
            paths = [str(file) for file in files]
            options = {**options, "split": spec["split"], "streaming": spec["streaming"]}
            dataset = load_dataset(reader, data_files=paths, **options)
    except Exception as error:  # each reader of `datasets` has errors of its own
        raise _unreadable(name, error, is_here=files is not None) from error
    if dataset.column_names is None:  # a stream that shows them with its first document
        return dataset
    _require_column(name, column, dataset.column_names)
    return dataset.select_columns(column) if isinstance(dataset, Dataset) else dataset


def _find_files(source: str) -> list[Path] | None:
    """Return the files that a source means, or None if it can only be a Hub id."""
    path = Path(source)
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = [file for file in path.rglob("*") if not any(p.startswith(".") for p in file.relative_to(path).parts)]
    else:
        files = [Path(file) for file in glob.glob(source, recursive=True)]
        if not files and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) and _kind(path) not in READERS:
            return None
    found = sorted(file for file in files if file.is_file())
    usable = [file for file in found if _kind(file) in READERS]
    if not usable and (found or path.is_dir()):
        raise ValueError(f"source {source!r} has no {', '.join(READERS)} file: give some, or name another source")
    if not usable:
        raise FileNotFoundError(f"source {source!r} does not exist: name a file, a folder, a glob, or a Hub id")
    readers = {READERS[_kind(file)][0] for file in usable}
    if len(readers) > 1:
        raise ValueError(
            f"source {source!r} has files of several kinds ({', '.join(sorted(readers))}): name those of one kind, "
            "with a glob for example"
        )
    if not any(file.stat().st_size for file in usable):
        raise ValueError(f"source {source!r} is empty: give a text with words in it")
    return usable


def _kind(file: Path) -> str:
    """Suffix of a file, gzipped or not."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def _unreadable(name: str, error: Exception, is_here: bool = True) -> ValueError:
    remedy = "check its files and split" if is_here else "it is not here, so check the Hub id, its config and split"
    reason = (isinstance(error, DatasetGenerationError) and error.__cause__) or error
    return ValueError(f"source {name!r} cannot be read ({' '.join(str(reason).split()) or repr(reason)}): {remedy}")


def _require_column(name: str, column: str, columns: list[str]) -> None:
    if column not in columns:
        raise ValueError(f"source {name!r} has no column {column!r}: choose `column` among {', '.join(columns)}")


# Tasks


class _Task:
    """A task as a source: it counts the samples and the fillers that were drawn."""

    is_task = True

    def __init__(self, name: str, spec: dict, tokenizer: PreTrainedTokenizerBase, segment_length: int, seed: str):
        self.seed, self.samples, self.fillers = seed, 0, 0
        kind = spec["task"]
        if kind not in TASKS:
            raise ValueError(f"task {kind!r} is unknown: choose one of {', '.join(TASKS)}")
        own = set(inspect.signature(TASKS[kind]).parameters) - {"tokenizer", "segment_length"}
        _require_known(name, spec, own | {"task", "weight", "name", "context_loss"})
        self.context_loss = _number(name, "context_loss", spec.get("context_loss", 0.1))
        options = {field: value for field, value in spec.items() if field in own}
        if options.get("haystack") is not None:
            text, text_name = _as_dict(options["haystack"]), f"{name}/haystack"
            _require_known(text_name, text, {"source", *TEXT_DEFAULTS})
            if "source" not in text:
                raise ValueError(f"source of {text_name!r} is missing: name a text")
            prose = _Stream(text_name, text, tokenizer, f"{seed}/haystack", bare=True)
            options["haystack"] = prose.read_epoch(HAYSTACK_TOKENS)
        try:
            self.task: RetrievalTask = TASKS[kind](tokenizer, segment_length=segment_length, **options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"source {name!r}: {error}") from error

    def row(self, length: int, continued: bool) -> tuple[torch.Tensor, ...]:
        sample = self.task.sample(random.Random(f"{self.seed}/rows/{self.samples}"), length, continued=continued)
        self.samples += 1
        ids, positions = torch.tensor(sample.ids), torch.arange(length)
        answers = [sample.answer, *sample.earlier]
        answer_tokens = sum(answer.stop - answer.start for answer in answers)
        weights = torch.full((length,), self.context_loss / max(length - 1 - answer_tokens, 1))
        for answer in answers:
            weights[answer] = 1 / answer_tokens
        weights[0] = 0
        return ids, positions, ids.where(weights > 0, NO_TARGET), weights

    def filler(self, length: int, start: bool, ahead: int) -> torch.Tensor:
        ids = self.task.filler(random.Random(f"{self.seed}/filler/{self.fillers}"), length, start)
        self.fillers += 1
        return torch.tensor(ids)

    def document(self, room: int) -> tuple[int, ...] | None:
        return ()

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples, "fillers": self.fillers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.samples, self.fillers = state["samples"], state["fillers"]


def _as_dict(spec: dict[str, Any] | str) -> dict[str, Any]:
    if not isinstance(spec, (dict, str)):
        raise ValueError(f"{spec!r} is no source: give a dict of fields, or a string")
    return {"source": spec} if isinstance(spec, str) else spec


def _require_known(name: str, spec: dict[str, Any], known: set[str]) -> None:
    for field in spec:
        if field not in known:
            raise ValueError(f"field {field!r} of {name!r} is unknown: choose among {', '.join(sorted(known))}")


def _number(name: str, field: str, value: Any, positive: bool = False) -> float:
    is_number = isinstance(value, (int, float)) and math.isfinite(value)
    if not is_number or value < 0 or (positive and value == 0):
        least = "above 0" if positive else "of at least 0"
        raise ValueError(f"{field} of {name!r} is {value!r}: give a number {least}")
    return value
