"""A configuration from plain values, and what differs between two of them."""

from typing import Any

from pydantic import ValidationError

from rlaifv.config import RunConfig
from rlaifv.errors import ConfigError


def parse_config(values: dict[str, Any], *, source: str) -> RunConfig:
    """A validated configuration; raises ConfigError naming `source` and every bad key."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(str(part) for part in item['loc']) or '(whole)'}: {item['msg']}"
            for item in error.errors()
        ]
        raise ConfigError(
            "\n".join([f"{source}: the configuration is not valid", *lines])
        ) from error


def changed_fields(old: RunConfig, new: RunConfig) -> list[str]:
    """`section.key: old -> new` for every difference, sorted; a grown `iterations` is none."""
    left, right = flat_fields(old.model_dump(mode="json")), flat_fields(new.model_dump(mode="json"))
    if new.iterations >= old.iterations:
        right["iterations"] = left["iterations"]
    keys = sorted(set(left) | set(right))
    return [
        f"{key}: {left.get(key, '(absent)')!r} -> {right.get(key, '(absent)')!r}"
        for key in keys
        if left.get(key, "(absent)") != right.get(key, "(absent)")
    ]


def flat_fields(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, keys joined with dots."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= flat_fields(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat
