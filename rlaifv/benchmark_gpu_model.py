"""What `benchmark_gpu` measures with: a random model of a shape, its inputs, and a stopwatch."""

import io
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from rlaifv.models.attention import IMPLEMENTATION
from rlaifv.models.llava import Llava
from rlaifv.models.prompting import Prompter
from rlaifv.models.random_weights import Shape, make_llava, make_processor
from rlaifv.models.shared_prefix import SharedPrefixModel

SEVEN_B = Shape(
    hidden=4096,
    intermediate=11008,
    layers=32,
    heads=32,
    kv_heads=32,
    vocabulary=32064,
    vision_hidden=1024,
    vision_layers=24,
    vision_heads=16,
    image_size=336,
    initializer_range=0.02,
)
SMALL = Shape(
    hidden=256, intermediate=512, layers=3, heads=4, kv_heads=2, image_size=336, vocabulary=600
)
REQUEST = (
    "Describe the image in detail. What can you see on the left, on the right, near the window "
    "and on the table?"
)
WORDS = [
    "cup",
    "dog",
    "chair",
    "lamp",
    "cat",
    "bottle",
    "table",
    "window",
    "person",
    "plate",
    "red",
    "blue",
    "green",
    "white",
    "black",
]


class Size(NamedTuple):
    """How much of everything."""

    claims: tuple[tuple[int, int, int], ...]
    """Claims of an image, images, images per forward pass."""
    samples: int
    prompts: int
    new_tokens: int
    pairs: int
    """Of a training step; with checkpointing twice as many."""
    sentences: int
    """Of an answer."""
    calls: int
    """Of a model, one queued ahead of the other."""
    repeats: int
    ceiling: int
    """Rows of the square matrices."""


FULL = Size(((80, 16, 4), (20, 32, 8), (8, 64, 16)), 10, 48, 120, 4, 5, 4, 3, 8192)
TINY = Size(((6, 2, 2), (3, 3, 2)), 3, 2, 4, 2, 1, 2, 1, 256)


class Ceilings(NamedTuple):
    """What the card does at best, per second."""

    flop: float
    bytes: float


class Bench:
    """The model, its inputs, and a stopwatch."""

    def __init__(self, shape: Shape, size: Size, device: torch.device, dtype: torch.dtype) -> None:
        self.size, self.device = size, device
        self.processor = make_processor(shape)
        torch.manual_seed(0)
        with torch.device(device):
            before = torch.get_default_dtype()
            torch.set_default_dtype(dtype)
            try:
                self.module: Any = make_llava(self.processor, shape).eval()
            finally:
                torch.set_default_dtype(before)
        self.module.set_attn_implementation(IMPLEMENTATION)
        self.module.model.vision_tower.requires_grad_(False)
        self.prompter = Prompter(self.processor, source="random")
        matrices = self.module.get_decoder().layers.parameters()
        self.layer_flop = 2.0 * sum(p.numel() for p in matrices)  # per token
        self.head_flop = 2.0 * self.module.lm_head.weight.numel()
        tower = self.module.model.vision_tower.parameters()
        self.image_tokens = (shape.image_size // shape.patch) ** 2
        self.image_flop = 2.0 * sum(p.numel() for p in tower) * (self.image_tokens + 1)
        self.kv_bytes = 4.0 * shape.layers * shape.hidden * shape.kv_heads / shape.heads
        self.ceilings = self._ceilings()

    def model(self, batch_size: int) -> SharedPrefixModel:
        return SharedPrefixModel(
            Llava(self.module), self.prompter, batch_size=batch_size, eos_ids=()
        )

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any], *, repeats: int | None = None) -> float:
        """Median, after one run for warming up."""
        work()
        self.sync()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(repeats or self.size.repeats):
            start = time.perf_counter()
            work()
            self.sync()
            times.append(time.perf_counter() - start)
        return float(np.median(times))

    def peak_gb(self) -> float:
        return torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else 0.0

    def _ceilings(self) -> Ceilings:
        n, dtype = self.size.ceiling, self.module.dtype
        a, b = (torch.randn(n, n, device=self.device, dtype=dtype) for _ in range(2))
        source = torch.empty(n * n * 32, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        product_s = self.seconds(lambda: [a @ b for _ in range(10)]) / 10
        copy_s = self.seconds(lambda: [target.copy_(source) for _ in range(10)]) / 10
        return Ceilings(2.0 * n**3 / product_s, 2.0 * source.numel() / copy_s)

    def limit_s(self, *, tokens: float, read: float, images: float, kv: float = 0.0) -> float:
        """Seconds at the ceilings: tokens through the layers, positions read, key-value tokens."""
        flop = tokens * self.layer_flop + read * self.head_flop + images * self.image_flop
        seconds: float = flop / self.ceilings.flop + kv * self.kv_bytes / self.ceilings.bytes
        return seconds

    def prefix(self, question: str) -> int:
        return len(self.prompter.prompt(question, row=0)) - 1 + self.image_tokens


def photo(seed: int, size: tuple[int, int] = (640, 480)) -> bytes:
    """A JPEG of coloured clouds."""
    noise = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def claims(image: int, count: int) -> tuple[str, ...]:
    """Different questions of about 21 tokens."""
    generator, found = np.random.default_rng(image), dict[str, None]()
    while len(found) < count:
        a, b, c, d, e = generator.choice(WORDS, 5)
        found[f"Is there a {a} {b} {c} near the {d} {e}? Please answer yes or no."] = None
    return tuple(found)
