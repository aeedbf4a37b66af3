"""The only place with an `if` on the URI scheme."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from rlaifv.errors import ConfigError
from rlaifv.store._local import LocalBackend
from rlaifv.store._store import Backend


def open_backend(uri: str) -> Backend:
    """The back end for `uri`; raises ConfigError for a scheme that is not known."""
    if uri.startswith(("s3:", "file:")) and "://" not in uri:
        raise ConfigError(f"{uri}: a URI has `://`, as in s3://bucket/runs or file:///data/runs")
    if "://" not in uri:
        return LocalBackend(Path(uri))
    if uri.startswith("s3://"):
        from rlaifv.store._s3 import S3Backend  # keeps boto3 out of local runs

        return S3Backend(uri)
    parts = urlsplit(uri)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise ConfigError(f"{uri}: a file URI has three slashes, as in file:///data/runs")
        return LocalBackend(Path(unquote(parts.path)))
    raise ConfigError(f"{uri}: unknown scheme {parts.scheme!r}; use a path, file:// or s3://")
