"""Tables and plots of what `scripts/evaluate.py` measured; both are made from its `results.json` alone."""

import importlib.util
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from infini_llama.scripts.evaluation_tasks import bucket, bucket_label

__all__ = ["by_compressions", "plot", "tables"]

# Table 2 of the paper (arXiv 2404.07143): start/middle/end, zero-shot and after 400 steps of fine-tuning.
PAPER_LENGTHS = (32_768, 131_072, 262_144, 524_288, 1_048_576)
PAPER = {
    "zero-shot linear": ("14/13/98", "11/14/100", "6/3/100", "6/7/99", "8/6/98"),
    "zero-shot delta": ("13/11/99", "6/9/99", "7/5/99", "6/8/97", "7/6/97"),
    "tuned linear": ("100/100/100", "100/100/100", "100/100/100", "97/99/100", "96/94/100"),
    "tuned delta": ("100/100/100", "100/100/99", "100/100/99", "100/100/100", "100/100/100"),
}
# Table 4: ROUGE-1, 2 and L on BookSum, of an 8B model that was tuned on it, on inputs of up to 500K tokens.
PAPER_ROUGE = {"linear": (0.379, 0.087, 0.176), "delta": (0.400, 0.088, 0.179)}
RETRIEVAL = ("passkey", "needle", "babilong")


def cells_of(content: dict[str, Any], task: str) -> dict[tuple[str, ...], dict[str, Any]]:
    """Cells of a task, by the rest of their names."""
    split = {tuple(key.split("/")): cell for key, cell in content["cells"].items()}
    return {key[1:]: cell for key, cell in split.items() if key[0] == task}


def bucket_start(label: str) -> int:
    return int(label.partition("-")[0])


def by_compressions(cells: Iterable[dict[str, Any]]) -> dict[str, dict[str, tuple[int, int]]]:
    """Of retrieval cells: completed segments between evidence and question -> system -> right answers, answers."""
    counts: dict[int, dict[str, tuple[int, int]]] = {}
    for sample in (sample for cell in cells for sample in cell["samples"]):
        row = counts.setdefault(bucket(sample["compressions"]), {})
        for system, right in sample["right"].items():
            before = row.get(system, (0, 0))
            row[system] = before[0] + right, before[1] + 1
    return {bucket_label(index): counts[index] for index in sorted(counts)}


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}"


def numerically(names: Iterable[str]) -> list[str]:
    return sorted(set(names), key=float)


def systems_of(cells: Iterable[dict[str, Any]], field: str) -> list[str]:
    return list(dict.fromkeys(system for cell in cells for system in cell[field]))


# Tables


def tables(content: dict[str, Any]) -> str:
    """Markdown: what was measured on, and a table per task."""
    model, run = content["settings"]["model"], content["runs"][-1]
    lines = [
        f"# Evaluation of {model['model']}",
        f"N = {model['segment_length']}, memory update {model['memory_update']}, {model['dtype']}, seed {model['seed']}; "
        f"adapter {model['adapter']}, base {model['base']}. Commit {run['commit']}; "
        + ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        + f"; {run['machine']}, {run['device']}.",
        f"`{' '.join(run['command'])}`",
    ]
    makers = {task: retrieval_tables for task in RETRIEVAL}
    makers |= {"perplexity": perplexity_table, "summarise": summaries_table}
    makers |= {"gates": gates_table, "memory": memory_table}
    for task, make in makers.items():
        if cells := cells_of(content, task):
            lines += [f"## {task}", *make(task, cells)]
    return "\n\n".join(lines) + "\n"


def retrieval_tables(task: str, cells: dict[tuple[str, ...], dict[str, Any]]) -> list[str]:
    """Accuracy in percent, of all cells and by compressions."""
    samples = {len(cell["samples"]) for cell in cells.values()}
    rows, blocks = (
        [],
        [f"Whole answers that are right, in percent; {'/'.join(map(str, sorted(samples)))} samples each."],
    )
    depths = [] if task == "babilong" else numerically(key[-1] for key in cells)
    # A line: its cells by depth, and by what they are named.
    groups: dict[tuple[str, ...], dict[str, dict]] = {}
    for key, cell in cells.items():
        name, depth = (key[:-1], key[-1]) if depths else (key, "")
        groups.setdefault(name, {})[depth] = cell
    for name in sorted(groups, key=lambda name: (name[:-1], float(name[-1]))):
        for system in systems_of(groups[name].values(), "accuracy"):
            shares = [groups[name].get(depth, {}).get("accuracy", {}).get(system) for depth in depths or [""]]
            rows.append([*name, system, *map(percent, shares), *(paper(name[-1]) if task == "passkey" else [])])
    head = ["length", "system", *([f"depth {d}" for d in depths] or ["right"])]
    head = [*([] if task == "passkey" else ["variant"]), *head, *(PAPER if task == "passkey" else [])]
    blocks.append(table(head, rows))
    if task == "passkey":
        blocks.append(
            "The last columns are the paper's: start/middle/end, at the length closest to this, of an 1B model."
        )
    for variant in dict.fromkeys(key[:1] if task != "passkey" else () for key in cells):
        chosen = [cell for key, cell in cells.items() if key[: len(variant)] == variant]
        counts, systems = by_compressions(chosen), systems_of(chosen, "accuracy")
        shown = [
            [
                name,
                str(max(n for _, n in row.values())),
                *(percent(r / n) for r, n in (row[s] for s in systems if s in row)),
            ]
            for name, row in counts.items()
        ]
        blocks.append(f"By compressions{f', {variant[0]}' if variant else ''}:")
        blocks.append(table(["compressions", "samples", *systems], shown))
    return blocks


def paper(length: str) -> list[str]:
    """The paper's numbers at a length, if it has them."""
    near = [i for i, known in enumerate(PAPER_LENGTHS) if abs(int(length) / known - 1) < 0.05]
    return [values[near[0]] if near else "" for values in PAPER.values()]


def summed_losses(cells: Iterable[dict[str, Any]]) -> dict[str, dict[str, tuple[float, int]]]:
    """Of all texts together: system -> completed segments -> sum of losses, tokens."""
    total: dict[str, dict[str, tuple[float, int]]] = {}
    for cell in cells:
        for system, buckets in cell["losses"].items():
            mine = total.setdefault(system, {})
            for name, (loss, tokens) in buckets.items():
                before = mine.get(name, (0.0, 0))
                mine[name] = before[0] + loss, before[1] + tokens
    return {system: dict(sorted(b.items(), key=lambda item: bucket_start(item[0]))) for system, b in total.items()}


def perplexity_table(task: str, cells: dict[tuple[str, ...], dict[str, Any]]) -> list[str]:
    total = summed_losses(cells.values())
    buckets = list(next(iter(total.values())))
    rows = []
    for name in buckets:
        losses = [total[system][name][0] / total[system][name][1] for system in total]
        rows.append(
            [name, str(next(iter(total.values()))[name][1]), *(f"{x:.4f} ({math.exp(x):.2f})" for x in losses)]
        )
    for title, chosen in (("all", buckets), ("all but the first segment", buckets[1:])):
        if chosen:
            sums = {s: [sum(total[s][name][i] for name in chosen) for i in (0, 1)] for s in total}
            losses = [loss / tokens for loss, tokens in sums.values()]
            tokens = next(iter(sums.values()))[1]
            rows.append([title, str(tokens), *(f"{x:.4f} ({math.exp(x):.2f})" for x in losses)])
    blocks = [
        "Loss per token (perplexity), by the number of segments that were completed before; all texts together.",
        table(["segments", "tokens", *total], rows),
    ]
    rows = []
    for key, cell in cells.items():
        sums = {s: [sum(x) for x in zip(*b.values())] for s, b in cell["losses"].items()}
        losses = [loss / tokens for loss, tokens in sums.values()]
        rows.append(["/".join(key), str(int(next(iter(sums.values()))[1])), *(f"{x:.4f}" for x in losses)])
    return [*blocks, table(["text", "tokens", *total], rows)]


def mean_rouge(cells: Iterable[dict[str, Any]]) -> dict[str, tuple[float, ...]]:
    """System -> ROUGE-1, 2 and L, means over the books that it has summarised."""
    cells = list(cells)
    rows = {s: [tuple(c["rouge"][s].values()) for c in cells if s in c["rouge"]] for s in systems_of(cells, "rouge")}
    return {system: tuple(sum(column) / len(scores) for column in zip(*scores)) for system, scores in rows.items()}


def summaries_table(task: str, cells: dict[tuple[str, ...], dict[str, Any]]) -> list[str]:
    """All books together, the paper's numbers, and each book."""

    def row(*names: str, scores: tuple[float, ...]) -> list[str]:
        return [*names, *(f"{100 * score:.1f}" for score in (*scores, math.prod(scores) ** (1 / len(scores))))]

    rows = [row("all", system, "", scores=scores) for system, scores in mean_rouge(cells.values()).items()]
    rows += [row("the paper's", rule, "", scores=scores) for rule, scores in PAPER_ROUGE.items()]
    for key, cell in cells.items():
        rows += [row("/".join(key), s, str(cell["tokens"]), scores=r) for s, r in mean_rouge([cell]).items()]
    return [
        f"ROUGE (F1, stemmed, in percent) of {len(cells)} summaries; overall is the geometric mean of the three. The paper's "
        "are those of an 8B model that was tuned on BookSum, which ours need not be.",
        table(["book", "system", "tokens", "ROUGE-1", "ROUGE-2", "ROUGE-L", "overall"], rows),
    ]


def gates_table(task: str, cells: dict[tuple[str, ...], dict[str, Any]]) -> list[str]:
    layers = cells[()]["gates"]
    heads = [str(head) for head in range(len(layers[0]))]
    rows = [[str(i), *(f"{x:.3f}" for x in row), f"{sum(row) / len(row):.3f}"] for i, row in enumerate(layers)]
    return ["Share of the memory in the output of each head.", table(["layer", *heads, "mean"], rows)]


def memory_table(task: str, cells: dict[tuple[str, ...], dict[str, Any]]) -> list[str]:
    rows = []
    for segments, row in cells[()]["growth"].items():
        rank, norm = row["effective_rank"], row["normalizer_norm"]
        means = [sum(x) / len(x) for x in (rank, row["matrix_norm"], norm)]
        rows.append(
            [segments, f"{means[0]:.2f}", f"{min(rank):.2f}", f"{max(rank):.2f}", f"{means[1]:.4g}", f"{means[2]:.4g}"]
        )
    head = ["segments", "effective rank of M", "least layer", "largest layer", "norm of M", "norm of z"]
    return ["Means over layers and heads.", table(head, rows)]


# Plots


def plot(content: dict[str, Any], output: Path) -> list[str]:
    """A PNG per task; returns their names, none without matplotlib."""
    if not has_matplotlib():
        return []
    plotters = {"passkey": heatmaps, "needle": heatmaps, "babilong": curves, "perplexity": losses_plot}
    plotters |= {"summarise": rouge_plot, "gates": gates_plot, "memory": memory_plot}
    names = []
    for task, draw in plotters.items():
        if cells := cells_of(content, task):
            figure = draw(cells)
            figure.suptitle(f"{task}, {Path(content['settings']['model']['model']).name}")
            names.append(f"{task}.png")
            figure.savefig(output / names[-1], dpi=150)
    return names


def has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def new_figure(width: float, height: float) -> Any:
    """Without pyplot, which keeps figures, and wants a display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def heatmaps(cells: dict[tuple[str, ...], dict[str, Any]]) -> Any:
    """Depth x length, one map per variant and system."""
    lengths, depths = (numerically(key[i] for key in cells) for i in (-2, -1))
    variants = list(dict.fromkeys(key[:-2] for key in cells))
    systems = systems_of(cells.values(), "accuracy")
    figure = new_figure(2 + (0.6 * len(lengths) + 1) * len(systems), 1 + (0.4 * len(depths) + 1) * len(variants))
    axes = figure.subplots(len(variants), len(systems), squeeze=False)
    for variant, row in zip(variants, axes):
        for system, ax in zip(systems, row):
            values = [
                [cells.get((*variant, n, d), {}).get("accuracy", {}).get(system, math.nan) * 100 for n in lengths]
                for d in depths
            ]
            image = ax.imshow(values, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
            ax.set_xticks(range(len(lengths)), lengths, rotation=45, ha="right")
            ax.set_yticks(range(len(depths)), depths)
            ax.set(title=" ".join([*variant, system]), xlabel="tokens", ylabel="depth")
            for y, line in enumerate(values):
                for x, value in enumerate(line):
                    ax.text(x, y, "" if math.isnan(value) else f"{value:.0f}", ha="center", va="center", fontsize=8)
    figure.colorbar(image, ax=axes, label="right, %")
    return figure


def curves(cells: dict[tuple[str, ...], dict[str, Any]]) -> Any:
    """Accuracy against length, one panel per question type."""
    variants, systems = list(dict.fromkeys(key[0] for key in cells)), systems_of(cells.values(), "accuracy")
    figure = new_figure(1 + 4 * len(variants), 3.5)
    for variant, ax in zip(variants, figure.subplots(1, len(variants), squeeze=False, sharey=True)[0]):
        lengths = numerically(key[1] for key in cells if key[0] == variant)
        for system in systems:
            shares = [cells[variant, n]["accuracy"].get(system, math.nan) * 100 for n in lengths]
            ax.plot(range(len(lengths)), shares, marker="o", label=system)
        ax.set_xticks(range(len(lengths)), lengths, rotation=45, ha="right")
        ax.set(title=variant, xlabel="tokens", ylabel="right, %", ylim=(-3, 103))
        ax.legend()
    return figure


def losses_plot(cells: dict[tuple[str, ...], dict[str, Any]]) -> Any:
    """Loss against completed segments."""
    figure = new_figure(6, 4)
    ax = figure.subplots()
    total = summed_losses(cells.values())
    for system, buckets in total.items():
        ax.plot(range(len(buckets)), [loss / tokens for loss, tokens in buckets.values()], marker="o", label=system)
    names = list(next(iter(total.values())))
    ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
    ax.set(xlabel="completed segments", ylabel="loss per token")
    ax.legend()
    return figure


def rouge_plot(cells: dict[tuple[str, ...], dict[str, Any]]) -> Any:
    """ROUGE of all books together, a group of bars for each kind."""
    figure = new_figure(6, 4)
    ax = figure.subplots()
    systems = mean_rouge(cells.values())
    for index, (system, scores) in enumerate(systems.items()):
        places = [kind + (index - (len(systems) - 1) / 2) / (len(systems) + 1) for kind in range(len(scores))]
        ax.bar(places, [100 * score for score in scores], width=1 / (len(systems) + 1), label=system)
    ax.set_xticks(range(3), ["ROUGE-1", "ROUGE-2", "ROUGE-L"])
    ax.set(ylabel="F1, %")
    ax.legend()
    return figure


def gates_plot(cells: dict[tuple[str, ...], dict[str, Any]]) -> Any:
    """Layers x heads."""
    layers = cells[()]["gates"]
    figure = new_figure(2 + 0.35 * len(layers[0]), 1.5 + 0.2 * len(layers))
    ax = figure.subplots()
    image = ax.imshow(layers, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    ax.set(xlabel="head", ylabel="layer")
    figure.colorbar(image, ax=ax, label="share of the memory")
    return figure


def memory_plot(cells: dict[tuple[str, ...], dict[str, Any]]) -> Any:
    """Effective rank of M and norm of z against segments, a line per layer."""
    from matplotlib import colormaps

    growth = cells[()]["growth"]
    segments = [int(name) for name in growth]
    figure = new_figure(10, 4)
    for ax, field, title in zip(
        figure.subplots(1, 2), ("effective_rank", "normalizer_norm"), ("effective rank of M", "norm of z")
    ):
        layers = list(zip(*(row[field] for row in growth.values())))
        for index, values in enumerate(layers):
            color = colormaps["viridis"](index / max(len(layers) - 1, 1))
            ax.plot(segments, values, marker=".", color=color, label=f"layer {index}")
        ax.set(xscale="log", xlabel="segments", ylabel=title)
        if field == "normalizer_norm":
            ax.set_yscale("log")
    ax.legend(fontsize=6, ncols=2)
    return figure
