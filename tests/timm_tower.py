"""`python -m tests.timm_tower FOLDER [--write]`: OmniLMM's tower against timm's own module.

FOLDER holds timm 1.0.31 without what it depends on (`make timm`); torchvision, which it imports
for other models and which ties one release of torch, is replaced by an empty stand-in. Compares
keys, shapes and outputs; `--write` renews `tests/golden/eva02_timm.npz` for the unit tests.
"""

import argparse
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlaifv.models.eva import EvaTower, TowerShape

GOLDEN = Path(__file__).parent / "golden" / "eva02_timm.npz"
NAME, VERSION = "eva02_enormous_patch14_clip_224.laion2b_plus", "1.0.31"
SMALL = TowerShape(width=32, blocks=2, heads=4, mlp=274, table=4)
"""timm's ratio of MLP to width is that of the real tower: int(32 * 15360 / 1792)."""
SIZES = ((56, 56), (112, 112), (50, 70))
"""The table's own grid, stretched to 8 x 8, filled up and stretched to 4 x 5."""


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """The same numbers for the same name everywhere."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return torch.from_numpy(generator.normal(0, 0.3, shape)).float()


def fill(module: nn.Module) -> nn.Module:
    """All weights from their names."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            tensor.copy_(weight(name, tuple(tensor.shape)))
    return module.eval()


def pixels(size: tuple[int, int]) -> Tensor:
    return weight(f"pixels {size}", (2, 3, *size))


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def digest(named: Mapping[str, tuple[int, ...]]) -> str:
    lines = "\n".join(f"{name} {list(shape)}" for name, shape in sorted(named.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


class _Named(type):
    """A class whose every attribute is the attribute's name."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


def _named(name: str) -> type:
    if name.startswith("__"):  # `inspect` looks at every module's __file__
        raise AttributeError(name)
    return _Named(name, (), {})


class _Empty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """torchvision: every module is there, every name in it a class."""

    def find_spec(
        self, fullname: str, path: Any, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        del path, target
        if fullname.partition(".")[0] != "torchvision":
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__dict__["__getattr__"] = _named
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to do."""


class _Same(nn.Module):
    """Stands for the block that is left out."""

    def forward(self, x: Tensor, **_options: Any) -> Tensor:
        return x


def make_timm(folder: Path, **options: Any) -> nn.Module:
    """timm's tower as the release makes it: the last block is left out."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
        sys.meta_path.insert(0, _Empty())
    import timm  # type: ignore[import-not-found]

    if timm.__version__ != VERSION:
        raise SystemExit(f"timm is {timm.__version__}, expected {VERSION}")
    tower: nn.Module = timm.create_model(
        *(NAME,),
        pretrained=False,
        num_classes=0,
        dynamic_img_size=True,
        dynamic_img_pad=True,
        **options,
    )
    blocks: Any = tower.blocks
    blocks[-1] = _Same()
    return tower


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    small = {"img_size": 14 * SMALL.table, "embed_dim": SMALL.width, "num_heads": SMALL.heads}
    theirs = fill(make_timm(given.folder, depth=SMALL.blocks + 1, **small))
    ours = fill(EvaTower(SMALL))
    with torch.device("meta"):
        full = shapes(make_timm(given.folder)), shapes(EvaTower(TowerShape()))
    for what, (left, right) in {"small": (shapes(theirs), shapes(ours)), "full": full}.items():
        if left != right:
            raise SystemExit(f"{what}: {sorted(set(left.items()) ^ set(right.items()))[:4]}")
        print(f"{what}: {len(left)} names and shapes are equal")
    golden: dict[str, Any] = {"full": digest(full[0]), "small": digest(shapes(theirs))}
    worst = 0.0
    with torch.inference_mode():
        for size in SIZES:
            expected = theirs.forward_features(pixels(size))[:, 1:]  # type: ignore[operator]
            worst = max(worst, float((ours(pixels(size)) - expected).abs().max()))
            golden["{}x{}".format(*size)] = expected.numpy()
    print(f"largest difference of outputs: {worst:.2e}")
    if given.write:
        np.savez_compressed(GOLDEN, **golden)
    return int(worst > 1e-5)


if __name__ == "__main__":
    sys.exit(main())
