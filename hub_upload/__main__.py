"""Share an InfiniLlama on the Hugging Face Hub: build a model repository, check it, push it.

    python -m hub_upload build ./infini-smollm2 ./shared --repo-id alice/infini-smollm2 \\
        --base-model HuggingFaceTB/SmolLM2-135M-Instruct --license apache-2.0 --license-file LICENSE
    python -m hub_upload check ./shared
    python -m hub_upload push ./shared alice/infini-smollm2
    python -m hub_upload push ./shared alice/infini-smollm2 --upload

Where the project is installed, and not checked out, it is `python -m infini_llama.hub_upload`.

build   makes OUTPUT from a folder that scripts/convert.py or scripts/train.py (its model/) made, or from a PEFT adapter and
        the model that it belongs to (--base): weights as safetensors, code, config, tokenizer, chat template, licence,
        and a model card with the tables and pictures of scripts/evaluate.py. OUTPUT appears when it has passed the check.
check   looks at everything that others will get, and loads the folder in a fresh process, offline, where this project
        cannot be imported: it has to give the logits that it gives here, and the Python of its card has to run.
push    checks, and shows what would be uploaded; with --upload, uploads it as one commit. Log in with `hf auth login`.

The last line on stdout is the report, one JSON document; everything else goes to stderr. The exit status is 0, or 2
when something is refused or fails.
"""

import argparse
import json
import sys

from infini_llama.hub_upload.build import build
from infini_llama.hub_upload.check import check
from infini_llama.hub_upload.push import push
from infini_llama.scripts.convert import ConversionError
from infini_llama.scripts.generate import InputError, say

__all__ = ["main"]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hub_upload", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("build", help="make a checked model repository, as a folder")
    command.set_defaults(function=build)
    command.add_argument("source", help="folder of scripts/convert.py or scripts/train.py, or of a PEFT adapter")
    command.add_argument("output", help="folder to create; nothing is ever overwritten")
    command.add_argument("--repo-id", required=True, metavar="ID", help="where it will be pushed; the card names it")
    command.add_argument("--base-model", required=True, metavar="ID", help="Hub id of the Llama that it comes from")
    command.add_argument(
        "--license", required=True, metavar="ID", help="of the base model, as the Hub names it: apache-2.0, llama3.2"
    )
    command.add_argument("--license-file", metavar="PATH", help="its text, when the source folder has none")
    command.add_argument("--base", metavar="PATH", help="InfiniLlama folder that the adapter belongs to")
    command.add_argument(
        "--evaluation",
        dest="evaluations",
        metavar="PATH",
        action="append",
        default=[],
        help="output of scripts/evaluate.py: tables and pictures for the card; repeat it for more",
    )
    for name, of in (("dataset", "data it was trained on"), ("language", "code, as en"), ("tag", "on the Hub")):
        command.add_argument(
            f"--{name}", dest=f"{name}s", metavar="ID", action="append", default=[], help=f"{of}; repeat it for more"
        )
    command.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of a weight file (default: %(default)s)"
    )

    command = commands.add_parser("check", help="look for everything that must not leave this machine")
    command.set_defaults(function=check)
    command.add_argument("folder", help="what build has made")

    command = commands.add_parser("push", help="upload a folder, as one commit")
    command.set_defaults(function=push)
    command.add_argument("folder", help="what build has made")
    command.add_argument("repo_id", help="repository on the Hub; it is created if need be")
    what = command.add_mutually_exclusive_group()
    what.add_argument("--upload", action="store_true", help="do it")
    what.add_argument("--dry-run", dest="upload", action="store_false", help="show what would be done (default)")
    command.add_argument("--public", action="store_true", help="for everyone to see (default: private)")
    how = command.add_mutually_exclusive_group()
    how.add_argument("--update", action="store_true", help="replace the files of a repository that has some")
    how.add_argument("--create-pr", action="store_true", help="open a pull request in a repository that is there")
    command.add_argument("--revision", metavar="BRANCH", help="created if need be (default: main)")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = vars(build_parser().parse_args(argv))
    del arguments["command"]
    try:
        report = arguments.pop("function")(**arguments)
    except (InputError, ConversionError) as error:
        say(f"error: {error}")
        return 2
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
