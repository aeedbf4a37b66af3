"""Where named things lie: the policy of an iteration, and files named in a configuration."""

import importlib.resources
from pathlib import Path
from urllib.parse import unquote, urlsplit

from rlaifv.config import ModelSpec, RunConfig
from rlaifv.errors import ConfigError
from rlaifv.pipeline import choice_key, merged_key
from rlaifv.records import Choice
from rlaifv.store import Store, local_copy


def local_path(name: str) -> Path:
    """The file or folder that `name` means: a path, a URI, or `package:<module>/<path>`.

    `file:///...` and paths need not exist; an `s3://` tree or object is downloaded into the cache.
    Raises ConfigError for a package that is not installed, ArtifactError for a missing object.
    """
    if name.startswith("package:"):
        module, _, inner = name.removeprefix("package:").partition("/")
        try:
            return Path(str(importlib.resources.files(module).joinpath(inner)))
        except ModuleNotFoundError as error:
            raise ConfigError(f"{name}: no such package: {error}") from error
    if name.startswith("s3://"):
        return local_copy(name)
    if name.startswith("file://"):
        return Path(unquote(urlsplit(name).path))
    return Path(name)


def policy_tree(store: Store, config: RunConfig, iteration: int) -> str | None:
    """Key of the tree that iteration `iteration` starts from; None: `config.policy`.

    The only edge between iterations: the tree chosen by the latest iteration that chose one, or
    its merged form when that is an adapter.
    """
    for earlier in range(iteration - 1, -1, -1):
        choice = store.read_json(choice_key(earlier), Choice)
        if choice.tree is not None:
            return merged_key(earlier, choice.step) if config.train.lora else choice.tree
    return None


def policy_spec(store: Store, config: RunConfig, iteration: int) -> ModelSpec:
    """The policy of an iteration, also its DPO reference, with a path that can be loaded."""
    tree = policy_tree(store, config, iteration)
    if tree is None:
        return config.policy
    path = str(store.tree_path(tree))
    return config.policy.model_copy(update={"path": path, "revision": None})
