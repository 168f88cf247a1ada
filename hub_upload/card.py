"""The model card: metadata that the Hub reads, code that runs, numbers from results.json, limits."""

import copy
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

from infini_llama.configuration_infini import InfiniLlamaConfig
from infini_llama.scripts.evaluate import FORMAT
from infini_llama.scripts.evaluation_report import tables
from infini_llama.scripts.generate import InputError, one_line

__all__ = ["Evaluation", "evaluation_of", "make_card", "python_of", "repo_id_of"]

TEMPLATE = Path(__file__).with_name("card_template.md")
TAGS = ["infini-attention", "long-context", "llama", "custom_code"]


class Evaluation(NamedTuple):
    """What `scripts/evaluate.py` measured, for a card."""

    folder: str
    weights: int  # a fingerprint of what was measured
    markdown: str
    pictures: list[Path]


def evaluation_of(folder: str | os.PathLike, repo_id: str) -> Evaluation:
    """Make tables of a results.json, without the paths of the machine that it is from; find its pictures."""
    path = Path(folder) / "results.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        markdown = tables(without_paths(content, repo_id))
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(
            f"evaluation '{folder}' cannot be used ({one_line(error) or type(error).__name__}): give the --output of scripts/evaluate.py"
        ) from error
    # One heading level for the card, one for its section.
    markdown = re.sub(r"^#", "###", markdown, flags=re.MULTILINE)
    tasks = dict.fromkeys(key.partition("/")[0] for key in content["cells"])
    pictures = [picture for task in tasks if (picture := path.with_name(f"{task}.png")).is_file()]
    return Evaluation(str(folder), content["settings"]["model"]["weights"], markdown, pictures)


def without_paths(content: dict[str, Any], repo_id: str) -> dict[str, Any]:
    content = copy.deepcopy(content)
    model, run = content["settings"]["model"], content["runs"][-1]
    local = model["model"]
    run["command"] = [repo_id if word == local else name_of(word) for word in run["command"]]
    model["model"] = repo_id
    for field in ("adapter", "base"):
        model[field] = name_of(model[field])
    return content


def name_of(word: str | None) -> str | None:
    return Path(word).name if word and Path(word).is_absolute() else word


def make_card(
    *,
    config: InfiniLlamaConfig,
    repo_id: str,
    base_model: str,
    license: str,
    untrained: bool,
    evaluations: list[tuple[str, list[str]]],
    datasets: list[str],
    languages: list[str],
    tags: list[str],
) -> ModelCard:
    """Fill in the template.

    Args:
        config: of the model.
        repo_id: that the code loads.
        base_model: Hub id of the Llama that it comes from.
        license: of that Llama, as the Hub names it.
        untrained: whether the gates are where the conversion put them.
        evaluations: tables, and names of pictures in the repository.
        datasets: Hub ids.
        languages: codes.
        tags: beside the usual ones.
    """
    data = ModelCardData(
        base_model=base_model,
        license=license,
        library_name="transformers",
        pipeline_tag="text-generation",
        datasets=datasets or None,
        language=languages or None,
        tags=TAGS + tags,
    )
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        title=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        config=config,
        untrained=untrained,
        evaluations=evaluations,
        versions=f"torch {torch.__version__} and transformers {transformers.__version__}",
    )


def python_of(card: str) -> list[str]:
    """Return the blocks of Python of a card."""
    return re.findall(r"^```python\n(.*?)^```", card, flags=re.MULTILINE | re.DOTALL)


def repo_id_of(card: str) -> str | None:
    """Return the repository that a card's Python loads."""
    found = re.search(r"""from_pretrained\(["']([^"']+)["']""", "\n".join(python_of(card)))
    return found and found.group(1)
