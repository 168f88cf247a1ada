"""Tables, a picture and a page of what `scripts/benchmark.py` measured; all are made from its `benchmark.json` alone."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from infini_llama.scripts.evaluation_report import has_matplotlib, new_figure, table
from infini_llama.scripts.planning import bytes_text, plan_table

__all__ = ["page", "plot", "tables"]

PAGE_HEAD = """# Performance

What reading, decoding, training and memory cost, each number with its circumstances. `scripts/benchmark.py` writes this page
from its results; edit neither. Times are medians, with the smallest and the largest in brackets; ratios are of medians of
calls in turn in one run, with the smallest and the largest ratio of neighbours. *Floor* is the base Llama on the same segments
as independent texts, *full* the base Llama with full attention on the whole text, with the same weights.
"""


# Tables


def page(results: Iterable[dict[str, Any]]) -> str:
    """Markdown of several runs, one after the other."""
    return "\n".join([PAGE_HEAD, *(tables(result, level=2) for result in results)])


def tables(result: dict[str, Any], level: int = 1) -> str:
    """Markdown of one run: what was measured on, what theory expects, and a table per task.

    Args:
        result: `benchmark.json`.
        level: of its heading.
    """
    mark = "#" * level
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"{mark} {result['model']}, {result['dtype']}, {result['date']}",
        f"Commit {result['commit']}; {versions}; {result['machine']}. `{' '.join(result['command'])}`",
    ]
    if "theory" in result:
        lines.append(
            f"N = {result['segment_length']}, blocks of {result['block_length']} tokens. {theory_text(result)}"
        )
    makers: dict[str, Callable[[Any], list[str]]] = {
        "prefill": prefill_tables,
        "long": long_tables,
        "decode": decode_tables,
        "train": train_tables,
        "memory": memory_tables,
        "train_memory": train_memory_tables,
        "longest": longest_tables,
        "plan": lambda plans: [plan_table(content) for content in plans],
    }
    titles = {
        "prefill": "Reading",
        "long": "Reading a long text",
        "decode": "Decoding",
        "train": "A training step",
        "memory": "Memory of generate()",
        "train_memory": "Memory of a training step",
        "longest": "The longest text to train on",
        "plan": "On paper",
    }
    for name, make in makers.items():
        if name in result:
            lines += [f"{mark}# {titles[name]}", *make(result[name])]
    return "\n\n".join(lines) + "\n"


def theory_text(result: dict[str, Any]) -> str:
    """What the arithmetic alone leads to expect."""
    cost = result["theory"]
    text = (
        f"In theory a token takes {cost['floor'] / 1e6:.3g} M multiply-adds per layer at the floor, and "
        f"{cost['memory'] / 1e6:.3g} M more for the memory, {cost['ratio']:.3f} times the floor"
    )
    shares = [f"{ratio:.2f} at {int(length):,} tokens" for length, ratio in cost.get("full_over_ours", {}).items()]
    return text + (f"; full attention takes {', '.join(shares)} times ours." if shares else ".")


def timed(values: dict[str, float], unit: float = 1.0, digits: int = 3) -> str:
    median, low, high = (f"{values[name] * unit:.{digits}f}" for name in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


def ratio(comparison: dict[str, Any] | None) -> str:
    if comparison is None:
        return ""
    pairs = comparison["pair_ratios"]
    return f"{comparison['ratio_of_medians']:.3f} ({pairs['min']:.3f} to {pairs['max']:.3f})"


def prefill_tables(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        [
            f"{row['tokens']:,}",
            row["rule"],
            timed(row["ours_s"]),
            f"{row['tokens_per_s']:,.0f}",
            ratio(row),
            ratio(row.get("in_blocks")),
            timed(row["full"]["full_s"]) if "full" in row else "",
            ratio(row.get("full")),
        ]
        for row in rows
    ]
    names = [
        "tokens",
        "rule",
        "ours, s",
        "tokens/s",
        "ours / floor",
        "ours / floor in our blocks",
        "full, s",
        "full / ours",
    ]
    return [table(names, lines)]


def train_tables(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        [
            f"{row['tokens']:,}",
            row["rule"],
            timed(row["ours_s"]),
            f"{row['tokens_per_s']:,.0f}",
            ratio(row),
            ratio(row["in_blocks"]),
        ]
        for row in rows
    ]
    return [table(["tokens", "rule", "ours, s", "tokens/s", "ours / floor", "ours / floor in our blocks"], lines)]


def long_tables(content: dict[str, Any]) -> list[str]:
    rows = [
        [f"texts of {content['window']:,}", timed(content["short_tokens_per_s"], digits=0)],
        [
            f"windows of {content['window']:,} in one of {content['tokens']:,}",
            timed(content["long_tokens_per_s"], digits=0),
        ],
    ]
    return [
        table(["tokens", "tokens/s"], rows),
        f"A window over the text beside it: {timed(content['pair_ratios'])}. The same in the last quarter of the long text over that in the "
        f"first: {content['end_over_start']:.3f}.",
    ]


def decode_tables(content: dict[str, Any]) -> list[str]:
    floors, rows = content["floor"]["s_per_token"], []
    for name, values in content["s_per_token"].items():
        floor = floors["base" if name == "base" else "ours"]
        rows.append(
            [
                "base Llama, one segment" if name == "base" else f"{int(name):,}",
                "" if name == "base" else f"{content['read'][name]:,}",
                timed(values, 1e3, 2),
                f"{floor * 1e3:.2f}",
                f"{values['median'] / floor:.2f}",
            ]
        )
    texts = [
        table(["context", "of it read", "ms per token", "floor, ms", "over the floor"], rows),
        f"Largest over smallest median of the contexts: {content['flatness']:.3f}. Ours over the base Llama at the same "
        f"local length: {content['ours_over_base']:.3f}. {content['tokens']} tokens each, N = {content['segment_length']}.",
        f"The floor is what must be read and written, {bytes_text(sum(content['floor']['bytes']['ours'].values()))} with "
        f"weights, state, keys and values, at the {bytes_text(content['floor']['bandwidth']['bytes_per_s'])}/s that this run "
        "measured on large tensors. A token costs by shapes alone: contexts are read up to a limit, and the timeline is moved "
        "on by whole segments.",
    ]
    if content["completing_over_median"] is not None:
        texts.append(
            f"The {content['completing_tokens']} tokens that completed a segment: {content['completing_over_median']:.3f} "
            "of the median."
        )
    return texts


def memory_tables(content: dict[str, Any]) -> list[str]:
    rows = [
        [f"{int(length):,}", f"{x['peak_mb']:.1f}", f"{x['peak_mb'] - x['ids_mb']:.1f}", f"{x['seconds']:.1f}"]
        for length, x in content["lengths"].items()
    ]
    return [
        table(["prompt", "peak, MB", "without the ids, MB", "s"], rows),
        f"A small random model. Longest over shortest, without the ids: {content['long_over_short']:.3f}.",
    ]


def train_memory_tables(content: dict[str, Any]) -> list[str]:
    rows = [
        [mode, segments, f"{child['activations_mb']:.1f}", f"{child['seconds']:.1f}"]
        for mode, part in content.items()
        for segments, child in part["segments"].items()
    ]
    shares = ", ".join(f"{part['long_over_short']:.3f} {mode}" for mode, part in content.items())
    return [
        table(["blocks", "segments", "activations, MB", "s"], rows),
        f"A small random model. Longest over shortest: {shares}.",
    ]


def longest_tables(content: dict[str, Any]) -> list[str]:
    rows = []
    for system, tokens in content["longest_tokens"].items():
        child = content["tried"][system][str(tokens)]
        rows.append([system, f"{tokens:,}", f"{child['peak_mb']:.0f}", f"{child['seconds']:.1f}"])
    how = "with checkpoints" if content["checkpointing"] else "without checkpoints"
    return [
        table(["model", "tokens", "peak, MB", "s per step"], rows),
        f"Processes of at most {content['budget_gb']:g} GB, {how}, segments per block of ours: {content['block_segments']}, "
        f"{content['dtype']}"
        f"{' under bfloat16 autocast' if content['autocast'] else ''}"
        f"{', with the states of AdamW' if content['optimizer_step'] else ''}: "
        f"{'at least ' if content['is_at_least'] else ''}{content['ours_over_base']:.1f} times as many.",
    ]


# The picture


def plot(result: dict[str, Any], path: Path) -> bool:
    """Cost against length, a panel per task, as a PNG that is there whole or not at all; False without matplotlib."""
    makers = {
        "prefill": prefill_panel,
        "long": long_panel,
        "decode": decode_panel,
        "train": prefill_panel,
        "memory": memory_panel,
    }
    panels = [(name, make) for name, make in makers.items() if name in result]
    if not panels or not has_matplotlib():
        return False
    figure = new_figure(5 * len(panels), 4)
    for ax, (name, make) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        make(ax, result[name])
        ax.set_title(name)
        ax.set_ylim(bottom=0)
        ax.legend()
    figure.suptitle(f"{result['model']}, {result['dtype']}, {result['machine']}", fontsize="small", wrap=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, dpi=150, format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def prefill_panel(ax: Any, rows: list[dict[str, Any]]) -> None:
    """Milliseconds per token of ours, the floor, and full attention."""
    curves: dict[str, dict[int, float]] = {}
    for row in rows:
        tokens = row["tokens"]
        curves.setdefault(row["rule"], {})[tokens] = row["ours_s"]["median"] / tokens
        curves.setdefault("floor", {})[tokens] = row["floor_s"]["median"] / tokens
        if "full" in row:
            curves.setdefault("full attention", {})[tokens] = row["full"]["full_s"]["median"] / tokens
    for name, points in curves.items():
        ax.plot(list(points), [1e3 * value for value in points.values()], marker="o", label=name)
    ax.set(xscale="log", xlabel="tokens", ylabel="ms per token")


def long_panel(ax: Any, content: dict[str, Any]) -> None:
    windows = content["windows_tokens_per_s"]
    ends = [(index + 1) * content["window"] for index in range(len(windows))]
    ax.plot(ends, [1e3 / value for value in windows], marker=".", label="one text")
    short = 1e3 / content["short_tokens_per_s"]["median"]
    ax.axhline(short, linestyle="--", color="gray", label=f"texts of {content['window']}")
    ax.set(xlabel="tokens read", ylabel="ms per token")


def decode_panel(ax: Any, content: dict[str, Any]) -> None:
    points = {int(name): x["median"] for name, x in content["s_per_token"].items() if name != "base"}
    ax.plot(list(points), [1e3 * value for value in points.values()], marker="o", label="ours")
    ax.axhline(1e3 * content["s_per_token"]["base"]["median"], linestyle="--", color="gray", label="base, one segment")
    ax.axhline(1e3 * content["floor"]["s_per_token"]["ours"], linestyle=":", color="black", label="floor")
    ax.set(xscale="log", xlabel="tokens of context", ylabel="ms per token")


def memory_panel(ax: Any, content: dict[str, Any]) -> None:
    points = {int(length): x["peak_mb"] - x["ids_mb"] for length, x in content["lengths"].items()}
    ax.plot(list(points), list(points.values()), marker="o", label="without the ids")
    ax.set(xscale="log", xlabel="tokens of the prompt", ylabel="peak of generate(), MB")
