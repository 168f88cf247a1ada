"""What context parallelism sends, beside what ring attention would, by arithmetic on a config.

    python scripts/context_bytes.py MODEL --ranks 8 --lengths 131072 1048576

Bytes are those that one rank sends in one layer for one training step, forward and backward pass, where every rank tells all
others what it has to say. Ring attention passes the keys and values of each rank around, and in the backward pass a second
time, with their gradients. Checkpointed layers repeat the forward pass of either.

For people everything goes to stderr; the last line on stdout is one JSON document.
"""

import argparse
import json
import sys

from transformers import AutoConfig, PreTrainedConfig

from infini_llama.scripts.generate import positive


def bytes_per_layer(config: PreTrainedConfig, num_ranks: int, batch_size: int = 1) -> int:
    """What a rank sends in a layer for one step: see `parallel_infini`. The state is float32."""
    per_head = 2 * config.head_dim  # z, and its gradient
    if config.memory_update == "linear":
        per_head += 2 * config.head_dim**2  # M, and its gradient
    elif config.memory_update == "delta":
        per_head += 3 * config.head_dim**2  # M with its factor, and the gradient of M
    elif config.memory_update == "least_squares":
        per_head = 4 * config.head_dim**2  # the normalizer, which has no gradient; M with its factor, and its gradient
    else:
        per_head = 0
    return 4 * per_head * config.num_key_value_heads * batch_size * (num_ranks - 1)


def ring_bytes_per_layer(
    config: PreTrainedConfig, num_ranks: int, num_tokens: int, batch_size: int = 1, itemsize: int = 2
) -> int:
    """What a rank sends in ring attention: keys and values forward; them and their gradients backward."""
    tensor = batch_size * (num_tokens // num_ranks) * config.num_key_value_heads * config.head_dim * itemsize
    return 6 * tensor * (num_ranks - 1)


def size(num_bytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of an InfiniLlama")
    parser.add_argument("--ranks", type=positive, default=8, help="over which a sequence is cut (%(default)s)")
    parser.add_argument(
        "--lengths", type=positive, nargs="+", default=[131_072, 1_048_576], help="tokens of a sequence"
    )
    parser.add_argument("--batch-size", type=positive, default=1, help="sequences per step (%(default)s)")
    args = parser.parse_args(argv)
    config = AutoConfig.from_pretrained(args.model, trust_remote_code=True)
    ours = bytes_per_layer(config, args.ranks, args.batch_size)
    rows = []
    for length in args.lengths:
        ring = ring_bytes_per_layer(config, args.ranks, length, args.batch_size)
        rows.append({"tokens": length, "bytes": ours, "ring_attention_bytes": ring})
    print(f"bytes that each of {args.ranks} ranks sends per layer and step, `{config.memory_update}`", file=sys.stderr)
    print(f"{'tokens':>12}{'memories':>12}{'ring attention, bf16':>24}{'ratio':>8}", file=sys.stderr)
    for row in rows:
        ratio = row["ring_attention_bytes"] / ours if ours else float("inf")
        print(
            f"{row['tokens']:>12,}{size(ours):>12}{size(row['ring_attention_bytes']):>24}{ratio:>8.0f}",
            file=sys.stderr,
        )
    print(json.dumps({"ranks": args.ranks, "layers": config.num_hidden_layers, "per_layer": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
