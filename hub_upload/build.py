"""Build a model repository, as a folder: everything that a user of the model needs, and nothing else."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from infini_llama.cache_infini import projection_fingerprint
from infini_llama.configuration_infini import InfiniLlamaConfig
from infini_llama.hub_upload.card import Evaluation, evaluation_of, make_card
from infini_llama.hub_upload.check import check, reference
from infini_llama.modeling_infini import InfiniLlamaForCausalLM
from infini_llama.scripts.convert import COMPANIONS, LICENCES, copy_files, require_free_output, working_folder
from infini_llama.scripts.evaluate import with_adapter
from infini_llama.scripts.generate import InputError, load_model, one_line, say

__all__ = ["build"]

GATE = "memory_gate"


def build(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    repo_id: str,
    base_model: str,
    license: str,
    license_file: str | os.PathLike | None = None,
    base: str | os.PathLike | None = None,
    evaluations: list[str] = (),
    datasets: list[str] = (),
    languages: list[str] = (),
    tags: list[str] = (),
    max_shard_size: str = "5GB",
) -> dict[str, Any]:
    """Make a folder that can be pushed, and check it.

    Args:
        source: folder of an InfiniLlama, or of a PEFT adapter.
        output: folder to create; it appears only when the check has passed, and nothing is overwritten.
        repo_id: of the repository that it is for. The code in the card names it.
        base_model: Hub id of the Llama that the model comes from.
        license: of that Llama, as the Hub names it.
        license_file: text of the licence; needed if `source` (with an adapter, `base`) has none.
        base: folder of the InfiniLlama that an adapter belongs to; the adapter is merged into it.
        evaluations: folders that scripts/evaluate.py wrote.
        datasets: Hub ids of what it was trained on.
        languages: their codes.
        tags: further ones for the Hub.
        max_shard_size: of a weight file.

    Returns:
        The report of the check, with source and output.

    Raises:
        InputError, ConversionError: it cannot be built, or has not passed the check. There is no output then.
    """
    source, output = Path(source), Path(output).resolve()
    require_free_output(output, source.resolve())
    for field, value in (("repo_id", repo_id), ("base_model", base_model)):
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", value):
            raise InputError(f"{field} is '{value}': give it as the Hub does, owner/name")
    root = root_of(source, base)
    licence = find_licence(root, license_file)
    results = [evaluation_of(folder, repo_id) for folder in evaluations]
    model = load_merged(root, source) if root != source else load_model(str(source))[0]
    require_results_of(model, results)
    expected = reference(model)
    with working_folder(output) as work:
        folder = Path(work) / output.name
        try:
            model.save_pretrained(folder, max_shard_size=max_shard_size)
            copy_files(root, folder, COMPANIONS)
            if licence is not None:
                shutil.copyfile(licence, folder / "LICENSE")
            with (folder / "NOTICE").open("a", encoding="utf-8") as notice:
                notice.write(notice_of(base_model, license, merged=root != source))
            pictures = copy_pictures(results, folder)
            card = make_card(
                config=model.config,
                repo_id=repo_id,
                base_model=base_model,
                license=license,
                untrained=is_untrained(model),
                evaluations=[(result.markdown, names) for result, names in zip(results, pictures)],
                datasets=list(datasets),
                languages=list(languages),
                tags=list(tags),
            )
            card.save(folder / "README.md")
            del model
            report = check(folder, expected)
            folder.rename(output)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"output '{output}' cannot be made ({one_line(error)}): make room, or choose another"
            ) from error
    return {"source": str(source), **report, "folder": str(output)}


def root_of(source: Path, base: str | os.PathLike | None) -> Path:
    """Return the folder that everything but the adapter comes from."""
    if not source.is_dir():
        raise InputError(f"source '{source}' is no folder: give one that convert.py or train.py made, or an adapter's")
    is_adapter = (source / "adapter_config.json").is_file()
    if is_adapter and base is None:
        raise InputError(f"source '{source}' is a PEFT adapter: name the InfiniLlama it belongs to with --base")
    if is_adapter and not Path(base).is_dir():
        raise InputError(f"base '{base}' is no folder: give the InfiniLlama that the adapter belongs to")
    if base is not None and not is_adapter:
        say("warning: --base has no effect, the source is no adapter")
    return Path(base) if is_adapter else source


def find_licence(root: Path, license_file: str | os.PathLike | None) -> Path | None:
    """Return the text to add; None if there is one that `copy_files` brings along."""
    if license_file is not None:
        if not Path(license_file).is_file():
            raise InputError(f"license_file '{license_file}' is no file: name the text of the base model's licence")
        return Path(license_file)
    if not any(path.is_file() for pattern in LICENCES[:2] for path in root.glob(pattern)):
        raise InputError(f"'{root}' has no licence file: name the text of the base model's with --license-file")
    return None


def load_merged(root: Path, adapter: Path) -> InfiniLlamaForCausalLM:
    """Merge in float32, as small steps get lost in 16 bits, and return to the base's own dtype."""
    model = with_adapter(load_model(str(root), dtype="float32")[0], str(adapter))
    dtype = InfiniLlamaConfig.from_pretrained(root).dtype or torch.float32
    for name, parameter in model.named_parameters():
        if GATE not in name:
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def require_results_of(model: InfiniLlamaForCausalLM, results: list[Evaluation]) -> None:
    """Refuse numbers that another model gave."""
    weights = int(projection_fingerprint(model).item())
    for result in results:
        if result.weights != weights:
            raise InputError(
                f"evaluation '{result.folder}' was measured with other weights: run scripts/evaluate.py on this model"
            )


def notice_of(base_model: str, license: str, *, merged: bool) -> str:
    changes = "trained with an adapter, which is merged into its weights, and " if merged else ""
    return (
        f"This model is derived from {base_model}, which is licensed under {license}; see the licence file.\n"
        f"Changes: it was {changes}given Infini-attention: gates in its attention layers, and the modeling code\n"
        "in the files *_infini.py (Apache-2.0). Its weights may have been trained further.\n"
    )


def copy_pictures(results: list[Evaluation], folder: Path) -> list[list[str]]:
    """Copy the PNGs of each evaluation, and return their names in the repository."""
    names = []
    for index, result in enumerate(results, 1):
        names.append([f"images/{index}_{picture.name}" for picture in result.pictures])
        for picture, name in zip(result.pictures, names[-1]):
            (folder / "images").mkdir(exist_ok=True)
            shutil.copyfile(picture, folder / name)
    return names


def is_untrained(model: InfiniLlamaForCausalLM) -> bool:
    """Whether every gate is where the conversion put it."""
    gates = {name: parameter for name, parameter in model.named_parameters() if GATE in name}
    starts = {name: model.config.gate_init if name.endswith("bias") else 0.0 for name in gates}
    return all(bool((gate == starts[name]).all()) for name, gate in gates.items())
