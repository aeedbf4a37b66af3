"""Every flag of `python -m rlaifv.*`; imports no library, so that `--help` is instant."""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from rlaifv.cli import Parser

DTYPES = ("float32", "bfloat16", "float16")
MODEL = ("family", "prompt", "dtype", "revision", "trust_remote_code")
"""Flags that are fields of a `ModelSpec`."""
BENCHMARKS = ("amber", "mmhal", "object_halbench", "refomb")


def chat() -> argparse.ArgumentParser:
    """`python -m rlaifv.chat`."""
    parser = _program("chat", "One question about one image.")
    parser.add_argument(
        "--model", required=True, metavar="PATH", help="folder, hub id, or folder of an adapter"
    )
    parser.add_argument("--image", required=True, help="path or base64")
    parser.add_argument("--question", required=True, metavar="TEXT", help="about the image")
    parser.add_argument(
        "--base", metavar="PATH", help="base model of an adapter, if not the one it names"
    )
    parser.add_argument("--max-new-tokens", type=positive, metavar="N", help="default: 1024")
    return parser


def serve() -> argparse.ArgumentParser:
    """`python -m rlaifv.serve`."""
    parser = _program("serve", "Our engine behind OpenAI's chat completions protocol.")
    parser.add_argument("--model", required=True, metavar="PATH", help="folder or hub id")
    _model(parser, dtype="bfloat16")
    parser.add_argument("--host", default="127.0.0.1", help="there is no authentication")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")
    return parser


def _model(parser: argparse.ArgumentParser, *, dtype: str) -> None:
    parser.add_argument("--family", default="auto", help="as in ModelSpec; text: no images")
    parser.add_argument("--prompt", default="auto", help="as in ModelSpec")
    parser.add_argument("--dtype", choices=DTYPES, default=dtype, help=f"default: {dtype}")
    parser.add_argument("--revision", help="of a hub id: a commit, branch or tag")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code beside the weights"
    )


def merge() -> argparse.ArgumentParser:
    """`python -m rlaifv.merge`."""
    parser = _program("merge", "A LoRA adapter into a full checkpoint.")
    parser.add_argument(
        "--base", required=True, metavar="PATH", help="folder, URI or hub id of the full model"
    )
    parser.add_argument(
        "--adapter", required=True, metavar="PATH", help="folder or URI of the adapter (PEFT)"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to make")
    return parser


def best_of_n() -> argparse.ArgumentParser:
    """`python -m rlaifv.best_of_n`."""
    parser = _program("best_of_n", "The best of N answers by the aligned model's own reward.")
    parser.add_argument("--policy", required=True, metavar="PATH", help="the aligned model")
    parser.add_argument("--reference", required=True, metavar="PATH", help="its initial model")
    parser.add_argument("--generator", metavar="PATH", help="who answers (default: the policy)")
    parser.add_argument("--questions", type=Path, required=True, metavar="FILE", help="JSONL, ...")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="JSONL: a line per question"
    )
    parser.add_argument("--num-samples", type=positive, metavar="N", help="default: 16")
    as_sampling = "default: as sample.* in docs/reference.md"
    parser.add_argument("--temperature", type=float, help=as_sampling)
    parser.add_argument("--top-p", type=float, help=as_sampling)
    parser.add_argument("--top-k", type=int, help=as_sampling)
    parser.add_argument("--max-new-tokens", type=positive, metavar="N", help=as_sampling)
    parser.add_argument("--beta", type=float, help="default: as train.beta")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--dtype", choices=DTYPES, help="as in ModelSpec")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="as in ModelSpec")
    return parser


def models_check() -> argparse.ArgumentParser:
    """`python -m rlaifv.models.check`."""
    parser = _program("models.check", "Whether a model may be trusted as policy and labeller.")
    parser.add_argument("model", help="folder or hub id")
    _model(parser, dtype="float32")
    _json(parser)
    return parser


def benchmarks() -> argparse.ArgumentParser:
    """`python -m rlaifv.benchmarks`."""
    parser = _program(
        "benchmarks", "Scores files that were made elsewhere, and checks a benchmark's files."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    score = commands.add_parser("score", help="score answers of any model")
    _benchmark_data(score)
    score.add_argument("--answers", type=Path, required=True, metavar="FILE", help="JSONL or JSON")
    score.add_argument(
        "--reviews",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="replies of a judge, made elsewhere; may be repeated",
    )
    score.add_argument(
        "--hallucination-reviews",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="refomb: the same for its second score",
    )
    score.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON to write")
    score.add_argument("--cache", type=Path, metavar="DIR", help="folder of judge replies")
    _judge(score)
    check = commands.add_parser("check", help="which files are needed, and whether they are there")
    _benchmark_data(check)
    check.add_argument(
        "--questions", type=Path, metavar="FILE", help="the benchmark's question file"
    )
    _json(check)
    return parser


def _benchmark_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=BENCHMARKS, help="of the benchmark")
    parser.add_argument("--coco", type=Path, metavar="DIR", help="COCO 2014 annotation files")
    parser.add_argument("--ground-truth", type=Path, metavar="PATH", help="file (amber: folder)")
    parser.add_argument("--synonyms", type=Path, metavar="FILE", help="table of object names")
    parser.add_argument("--nltk-data", type=Path, metavar="DIR", help="NLTK's data folder")
    parser.add_argument("--mode", help="judge, rules or chair; for amber vectors or exact")


def _judge(score: argparse.ArgumentParser) -> None:
    judge = score.add_argument_group("judge (key: OPENAI_API_KEY; defaults: JudgeConfig)")
    judge.add_argument("--judge", metavar="URL", help="any OpenAI-compatible endpoint")
    judge.add_argument("--judge-model", help="default: the published scores' judge")
    judge.add_argument("--judge-prompt", metavar="FILE", help="replaces our wording")
    judge.add_argument("--judge-temperature", type=float, help="0: greedy")
    judge.add_argument("--judge-top-p", type=float, help="default: 1")
    judge.add_argument(
        "--judge-max-tokens", type=positive, metavar="N", help="default: the published scores'"
    )
    judge.add_argument("--judge-concurrency", type=int, metavar="N", help="requests at a time")
    judge.add_argument("--judge-attempts", type=int, metavar="N", help="requests per item")
    judge.add_argument("--judge-timeout", type=float, metavar="SECONDS", help="of a request")
    judge.add_argument("--judge-backoff", type=float, metavar="SECONDS", help="first pause")
    judge.add_argument("--repeats", type=int, metavar="N", help="judgings per answer")
    judge.add_argument("--seed", type=int, help="of the first repeat")
    judge.add_argument("--swap", action="store_true", help="refomb: both orders of the answers")
    judge.add_argument("--input-price", type=float, help="per million tokens")
    judge.add_argument("--output-price", type=float, help="per million tokens")


def held_out() -> argparse.ArgumentParser:
    """`python -m rlaifv.benchmarks.held_out`."""
    parser = _program("benchmarks.held_out", "Questions for choosing checkpoints.")
    parser.add_argument(
        "--coco", type=Path, required=True, metavar="DIR", help="COCO 2014 annotation files"
    )
    parser.add_argument(
        "--images", type=Path, required=True, metavar="DIR", help="folder of their images"
    )
    parser.add_argument(
        "--exclude",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="images that are used elsewhere; may be repeated",
    )
    parser.add_argument("--count", type=positive, metavar="N", help="questions (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSONL to write")
    return parser


def demo() -> argparse.ArgumentParser:
    """`python -m rlaifv.demo`."""
    parser = _program("demo", "Remakes the demo's models and data, or measures them.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    build_help = "make weights and data from a seed: 14 minutes on two busy cores"
    builder = commands.add_parser("build", help=build_help, description=build_help)
    builder.add_argument("--seed", type=int, default=0, help="default: 0")
    checker = commands.add_parser("check", help="measure policy and labeller: half a minute")
    for command in (builder, checker):
        command.add_argument(
            "--out", type=Path, metavar="DIR", help="their folder (default: the package's)"
        )
    return parser


def benchmark_gpu() -> argparse.ArgumentParser:
    """`python -m rlaifv.benchmark_gpu`."""
    parser = _program("benchmark_gpu", "This engine and the usual ways on one GPU.")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write everything as JSON")
    parser.add_argument("--tiny", action="store_true", help="a model of a few hundred kilobytes")
    parser.add_argument("--only", nargs="+", metavar="WORK", help="default: everything")
    return parser


def benchmark_iteration() -> argparse.ArgumentParser:
    """`python -m rlaifv.benchmark_iteration`."""
    parser = _program(
        "benchmark_iteration", "One small iteration through the real stages with a random 7B."
    )
    parser.add_argument(
        "--folder", type=Path, required=True, metavar="DIR", help="30 GB; weights are kept there"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write everything as JSON")
    parser.add_argument("--tiny", action="store_true", help="a model of a few megabytes")
    parser.add_argument(
        "--cold", action="store_true", help="each stage without compilers' caches, as in a new pod"
    )
    parser.add_argument("--instructions", type=positive, default=64, help="default: 64")
    parser.add_argument("--answers", type=positive, default=10, help="per instruction (10)")
    parser.add_argument("--new-tokens", type=positive, default=120, help="per answer (120)")
    parser.add_argument("--batch-size", type=positive, default=32, help="prompts or images (32)")
    parser.add_argument("--micro-batch-size", type=positive, default=4, help="pairs (4)")
    return parser


def benchmark_store() -> argparse.ArgumentParser:
    """`python -m rlaifv.benchmark_store`."""
    parser = _program("benchmark_store", "Throughput of the store beside plain boto3.")
    parser.add_argument("--root", required=True, metavar="URI", help="s3://bucket/prefix")
    parser.add_argument("--tree-mb", type=int, default=1024, help="size of the tree, in MiB")
    parser.add_argument("--parts", type=int, default=2000, help="number of small parts")
    parser.add_argument("--rounds", type=positive, default=3, help="default: 3")
    parser.add_argument(
        "--plain-checksums", choices=["when_supported", "when_required"], help="of plain boto3"
    )
    return parser


def benchmark_kernels() -> argparse.ArgumentParser:
    """`python -m rlaifv.benchmark_kernels`."""
    parser = _program("benchmark_kernels", "Shared prefixes against the usual ways on a CPU.")
    _json(parser)
    return parser


def benchmark_training() -> argparse.ArgumentParser:
    """`python -m rlaifv.benchmark_training`."""
    parser = _program("benchmark_training", "What a DPO step costs beside the usual layouts.")
    parser.add_argument("--pairs", type=positive, default=2, help="per step (2)")
    parser.add_argument("--words", type=positive, default=50, help="per answer (50)")
    parser.add_argument("--steps", type=positive, default=3, help="measured per path (3)")
    parser.add_argument("--vocabulary", type=positive, metavar="N", help="of the model")
    parser.add_argument(
        "--growth", action="store_true", help="our step alone, with longer answers and more pairs"
    )
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    return parser


PROGRAMS: Mapping[str, Callable[[], argparse.ArgumentParser]] = {
    "chat": chat,
    "serve": serve,
    "best_of_n": best_of_n,
    "merge": merge,
    "models.check": models_check,
    "benchmarks": benchmarks,
    "benchmarks.held_out": held_out,
    "demo": demo,
    "benchmark_gpu": benchmark_gpu,
    "benchmark_iteration": benchmark_iteration,
    "benchmark_kernels": benchmark_kernels,
    "benchmark_store": benchmark_store,
    "benchmark_training": benchmark_training,
}


def look_first(program: str) -> None:
    """Parses the command line before the program's libraries are imported.

    Help and mistakes then end at once; `main` parses again.
    """
    PROGRAMS[program]().parse_args(sys.argv[1:])


def positive(text: str) -> int:
    """A number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


def _program(name: str, description: str) -> argparse.ArgumentParser:
    return Parser(prog=f"python -m rlaifv.{name}", description=description)


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs")
