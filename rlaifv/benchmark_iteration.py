"""`python -m rlaifv.benchmark_iteration`: one small iteration through the real stages, timed.

A random LLaVA of the 7B's shape is written once; then every stage runs as the process that a
controller would start (`python -m jobs.sample ...`): starting Python, importing, loading the
weights and storing rows all count. Per stage: seconds, how much of them the GPU was busy, CPU
seconds of the host, peak memory of the process, rows.

What is random is the weights, not the work: one in twenty tokens of the vocabulary reads as a
sentence, so that answers have claims; yes and no are equally likely, which rejects every claim,
so that answers differ by how many claims they make and pairs exist.
"""

from rlaifv import flags

if __name__ == "__main__":
    flags.look_first("benchmark_iteration")

import argparse
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlaifv.benchmark_gpu_model import SEVEN_B
from rlaifv.config import RunConfig
from rlaifv.models.base import NO, YES
from rlaifv.models.random_weights import (
    PLACEHOLDER,
    SPECIAL_TOKENS,
    Shape,
    make_llava,
    make_processor,
)
from rlaifv.pipeline import CONFIG, STAGES, Shard, done_key
from rlaifv.recipes import Wishes, build_config
from rlaifv.store import Store, open_store

TIMED = ("prepare", "sample", "claim", "verify", "pair", "reflogp", "train")
TINY = Shape(vocabulary=2400, image_size=56)
SENTENCE_SHARE = 0.05
"""Of the vocabulary: an answer of 120 tokens has about 6 sentences of 20 words each."""
PLACES = ("table", "chair", "shelf", "window", "door", "floor", "bench", "wall")
THINGS = ("cup", "dog", "lamp", "cat", "bottle", "plate", "book", "clock", "plant", "box")
COLOURS = ("red", "blue", "green", "white", "black", "yellow", "brown", "grey", "orange", "pink")
REQUEST = "Describe the image in detail. What can you see on the left and on the right?"
GPU_PERIOD = 0.2
TERMINATED = 128 + signal.SIGTERM
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
"""Where compilers keep what they made; in a pod below its own /tmp."""


class Timing(NamedTuple):
    """What one stage took."""

    stage: str
    rows: int
    seconds: float
    """Wall clock of the process, from its start to its end."""
    inside: float
    """Of them, between the stage's first step and its last row, by the part's own provenance."""
    gpu_busy: float | None
    """Share of `seconds` in which a kernel ran, as the driver counts it; None without a GPU."""
    cpu_seconds: float
    """Of the process and its children."""
    peak_gb: float
    """Resident memory of the process on the host."""


def sentences(count: int) -> list[str]:
    """Different sentences of 20 words."""
    made = (
        f"There is a {colour} {thing} on the left of the {place} and a {other} near the "
        f"{second} in the picture."
        for other in THINGS
        for second in PLACES
        for place in PLACES
        for thing in THINGS
        for colour in COLOURS
    )
    return [next(made) for _ in range(count)]


def make_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Words apart at spaces; some tokens read as whole sentences, most as nothing."""
    spoken = sentences(round(SENTENCE_SHARE * size))
    words = dict.fromkeys([*YES, *NO, "USER:", "ASSISTANT:", *REQUEST.split()])
    words |= dict.fromkeys(word for sentence in spoken for word in sentence.split())
    entries = [*SPECIAL_TOKENS.values(), PLACEHOLDER, *words, *spoken]
    inner = Tokenizer(models.WordLevel({entry: i for i, entry in enumerate(entries)}, **_UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        extra_special_tokens={"image_token": PLACEHOLDER},
        **SPECIAL_TOKENS,
    )


_UNKNOWN = {"unk_token": SPECIAL_TOKENS["unk_token"]}


def save_model(folder: Path, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
    """The random checkpoint; on the device it takes seconds."""
    processor = make_processor(shape)
    processor.tokenizer = make_tokenizer(shape.vocabulary or 0)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            module: Any = make_llava(processor, shape)
    finally:
        torch.set_default_dtype(before)
    yes, no = (processor.tokenizer.convert_tokens_to_ids(list(words)) for words in (YES, NO))
    with torch.no_grad():
        module.lm_head.weight[no] = module.lm_head.weight[yes]
    module.save_pretrained(folder)
    processor.save_pretrained(folder)


def make_source(folder: Path, count: int) -> Path:
    """JPEG files of 640 x 480 and a request about each, as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        coarse = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=90)
        (folder / f"{number}.jpg").write_bytes(buffer.getvalue())
        lines.append(json.dumps({"question": REQUEST, "image": f"{number}.jpg"}))
    source = folder / "source.jsonl"
    source.write_text("\n".join(lines) + "\n")
    return source


def configuration(model: Path, source: Path, options: argparse.Namespace) -> RunConfig:
    """The LoRA recipe with one epoch and one checkpoint."""
    dtype = "float32" if options.tiny else "bfloat16"
    sets = {
        **{f"{key}.path": model for key in ("policy", "verify.labeller")},
        **{f"{key}.dtype": dtype for key in ("policy", "verify.labeller")},
        **{f"{key}.batch_size": options.batch_size for key in ("policy", "verify.labeller")},
        "claim.model": "{path: rules, family: rules}",
        "prepare.source": source,
        "prepare.instructions_per_iteration": options.instructions,
        "sample.num_answers": options.answers,
        "sample.max_new_tokens": options.new_tokens,
        "train.epochs": 1,
        "train.checkpoints_per_epoch": 1,
        "train.micro_batch_size": options.micro_batch_size,
        "train.min_pairs": 1,
        "shards": f"{{instructions: 1, reflogp: 1, group_size: {options.instructions}}}",
        "choose.held_out": "null",  # nothing is chosen: all pictures are for answers
        "pair.balance_length": "false",  # it may leave few pairs of so few answers
    }
    return build_config(
        Wishes(
            recipe="llava15_7b_lora",
            sets=tuple(f"{key}={value}" for key, value in sets.items()),
            name="benchmark",
            iterations=1,
        )
    )


class GpuWatch:
    """Asks the driver how busy the GPU is, while a stage runs."""

    def __init__(self) -> None:
        self._tool = shutil.which("nvidia-smi")
        self._ended = threading.Event()
        self._seen: list[float] = []
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "GpuWatch":
        if self._tool:
            self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        if self._tool:
            self._thread.join()

    @property
    def busy(self) -> float | None:
        """Mean share of time with a kernel running; None when there was nothing to see."""
        return sum(self._seen) / len(self._seen) / 100 if self._seen else None

    def _look(self) -> None:
        query = ("--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--id=0")
        command = [self._tool or "", *query]
        while not self._ended.wait(GPU_PERIOD):
            done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
            if done.returncode == 0 and done.stdout.strip().isdigit():
                self._seen.append(float(done.stdout))


def run_stage(run: Store, stage: str, folder: Path, *, cold: bool = False) -> Timing:
    """One stage as a process of its own; raises SystemExit with its log when it fails.

    `cold`: with empty caches of compilers, as in a new pod.

    Leaves `STAGE.log` and `STAGE.json` in the folder; what has been timed is not run again.
    """
    folder.mkdir(exist_ok=True)
    timed, log = folder / f"{stage}.json", folder / f"{stage}.log"
    if timed.exists():
        return Timing(**json.loads(timed.read_text()))
    arguments = ["--run", str(run), "--iteration", "0", "--shard", "0/1"]
    command = [sys.executable, "-m", f"jobs.{stage}", *arguments]
    with ExitStack() as stack:
        said, watch = stack.enter_context(log.open("wb")), stack.enter_context(GpuWatch())
        caches = stack.enter_context(tempfile.TemporaryDirectory()) if cold else None
        env = {name: f"{caches}/{name}" for name in CACHES} if caches else {}
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=said, stderr=said, env=os.environ | env)  # noqa: S603
        try:
            _, status, used = os.wait4(process.pid, 0)
        except (KeyboardInterrupt, SystemExit):  # Ctrl-C, SIGTERM: the stage ends, too
            process.terminate()
            process.wait()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - started
    if process.returncode:
        text = log.read_text(errors="replace")[-4000:]
        raise SystemExit(f"{stage} ended with {process.returncode}:\n{text}")
    provenance = run.provenance(done_key(0, stage, Shard(0, 1)))
    cpu, peak = used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20
    rows, inside = provenance.rows, provenance.seconds
    timing = Timing(stage, rows, seconds, inside, watch.busy, cpu, peak)
    partial = folder / f"{stage}.partial"
    partial.write_text(json.dumps(timing._asdict()))
    partial.rename(timed)
    return timing


def iteration(folder: Path, options: argparse.Namespace) -> Iterator[Timing]:
    """Everything; a folder with a run is gone on with, from the first stage that is not timed."""
    shape = TINY if options.tiny else SEVEN_B
    dtype = torch.float32 if options.tiny else torch.bfloat16
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started, model = time.monotonic(), folder / "model"
    if not model.exists():  # a second run measures with the same weights
        partial = folder / "model.partial"  # what a killed run left of it is not taken for a model
        shutil.rmtree(partial, ignore_errors=True)
        making = multiprocessing.get_context("spawn").Process(
            target=save_model, args=(partial, shape, device, dtype), daemon=True
        )  # or this process's peak of memory would be inherited by those that are measured
        making.start()
        making.join()
        if making.exitcode:
            raise SystemExit(f"the weights were not written: exit code {making.exitcode}")
        partial.rename(model)
    print(f"weights written in {time.monotonic() - started:.1f} s", flush=True)
    source = make_source(folder / "source", options.instructions)
    run = open_store(str(folder / "run"))
    run.write_json_once(CONFIG, configuration(model, source, options))
    for stage in TIMED:
        yield run_stage(run, stage, folder / "timings", cold=options.cold)


def line(timing: Timing) -> str:
    """A stage for people."""
    busy = "   -" if timing.gpu_busy is None else f"{100 * timing.gpu_busy:3.0f}%"
    return (
        f"{timing.stage:9} {timing.rows:6} {STAGES[timing.stage].writes:13} {timing.seconds:7.1f} s, "
        f"inside {timing.inside:6.1f} s, GPU {busy}, CPU {timing.cpu_seconds:6.1f} s, "
        f"{timing.peak_gb:5.1f} GB"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = flags.benchmark_iteration().parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    facts = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "options": {k: str(v) for k, v in vars(options).items()},
    }
    timings: list[Timing] = []
    for timing in iteration(options.folder, options):
        timings.append(timing)
        print(line(timing), flush=True)
    total = sum(timing.seconds for timing in timings)
    print(f"together {total:.1f} s")
    if options.out:
        every = {**facts, "seconds": total, "stages": [each._asdict() for each in timings]}
        options.out.write_text(json.dumps(every, indent=1))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    main()
