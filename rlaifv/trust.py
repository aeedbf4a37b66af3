"""When code that comes with a model's weights may be run."""

import re
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rlaifv.config import ModelSpec

M = TypeVar("M", bound="ModelSpec")


def trusted(spec: M) -> M:
    """The spec; raises ValueError when the code beside its weights may not be run.

    Family `minicpmv` has such code. A hub id needs the commit whose code was read: branches and
    tags move. A folder (`./name`, `/name`, a URI) is the user's own.
    """
    remote, path = spec.family == "minicpmv", spec.path
    if spec.endpoint or not (remote or spec.trust_remote_code):
        return spec
    folder = path.startswith((".", "/")) or ":" in path
    pinned = folder or re.fullmatch("[0-9a-f]{40}", spec.revision or "")
    if not (remote and spec.trust_remote_code and pinned):
        raise ValueError(
            f"{path}: code beside weights needs family minicpmv, trust_remote_code and a commit as "
            f"revision (not ./folders), or an endpoint: {spec.trust_remote_code}, {spec.revision}"
        )
    return spec
