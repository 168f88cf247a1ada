"""What somebody who downloads a model repository does with it; `check.py` runs this in a process of its own.

    python -P trial.py FOLDER REPO_ID

The working directory has `expected.safetensors`, and takes what the card's Python writes. The last line on stdout is one
JSON document.
"""

import json
import re
import sys
import traceback
from pathlib import Path

NEW_TOKENS = 8
# Of the largest logit: other alignments of the same weights in memory may add up in another order.
TOLERANCES = {"torch.float32": 1e-4}
TOLERANCE_OF_16_BITS = 2e-2


class Hidden:
    """Makes this project impossible to import."""

    @staticmethod
    def find_spec(name: str, *args: object) -> None:
        if name.partition(".")[0] == "infini_llama":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def try_out(folder: str, repo_id: str, report: dict) -> None:
    """Load, compare, generate, run the card; `report["step"]` tells how far it got."""
    report["step"] = "loading"
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    expected = load_file("expected.safetensors")
    model, loading = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    wrong = {name: sorted(map(str, value)) for name, value in loading.items() if value}
    if wrong:
        raise ValueError(f"the weights are not those of the config: {wrong}")
    if not type(model).__module__.startswith("transformers_modules."):
        raise ValueError(f"auto_map leads to {type(model).__module__}, which is not in the folder")

    report["step"] = "comparing the logits with those of the source"
    usual = model.config.segment_length
    model.config.segment_length = length = expected["segment_length"].item()
    with torch.no_grad():
        logits = model(expected["ids"]).logits
    difference = (logits - expected["logits"]).abs().max().item()
    allowed = TOLERANCES.get(str(logits.dtype), TOLERANCE_OF_16_BITS) * expected["logits"].abs().max().item()
    # Written so that NaN fails, too.
    if not difference <= allowed:
        raise ValueError(f"they differ by up to {difference}, more than {allowed:.2g}")
    report["max_abs_diff"] = difference

    report["step"] = "generating across a segment boundary"
    ids = expected["ids"][:, : 2 * length - NEW_TOKENS // 2]
    options = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    if tokens.shape[1] != ids.shape[1] + NEW_TOKENS:
        raise ValueError(f"{tokens.shape[1] - ids.shape[1]} tokens came, and {NEW_TOKENS} were asked for")
    model.config.segment_length = usual

    Path("book.txt").write_text("The sun rose late. Nobody saw it.\n\n" * 50, encoding="utf-8")
    card = (Path(folder) / "README.md").read_text(encoding="utf-8")
    session: dict = {}
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL), 1):
        report["step"] = f"block {number} of Python in README.md"
        code = re.sub(rf"""(["']){re.escape(repo_id)}\1""", lambda _: repr(folder), block)
        exec(compile(code, f"README.md, block {number}", "exec"), session)
    if "infini_llama" in sys.modules:
        raise ValueError("it imported this project, which others do not have")


def main() -> int:
    sys.meta_path.insert(0, Hidden)
    report: dict = {}
    try:
        try_out(*sys.argv[1:], report)
    # Whatever somebody else's code in the folder may raise, or exit with.
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        print(json.dumps({"step": report["step"], "error": f"{type(error).__name__}: {error}"}))
        return 1
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
