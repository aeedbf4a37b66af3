"""What went wrong on S3, in an operator's words, and whether asking again may help."""

from typing import NamedTuple

from botocore import exceptions as boto
from botocore.exceptions import BotoCoreError, ClientError

from rlaifv.errors import ArtifactError, ConfigError, RlaifvError, TransientError


class Place(NamedTuple):
    """Which bucket of which endpoint, for messages; never holds a secret."""

    bucket: str
    endpoint: str

    def __str__(self) -> str:
        return f"bucket {self.bucket} at {self.endpoint}" if self.endpoint else self.bucket


class Advice(NamedTuple):
    """What an error means for the operator."""

    kind: type[RlaifvError]
    text: str
    again: bool = False
    """The same request may succeed in a moment."""
    renew: bool = False
    """It may succeed with credentials that are read anew."""


class Judgement(NamedTuple):
    """The error to raise, unless the request is made again."""

    error: RlaifvError
    again: bool
    renew: bool


_DENIED = Advice(
    ConfigError,
    "access denied; the role needs GetObject, PutObject, DeleteObject, AbortMultipartUpload and "
    "ListBucket (without ListBucket a missing object looks forbidden)",
)
_KEYS = Advice(ConfigError, "the server does not accept these credentials")
_REGION = Advice(ConfigError, "wrong region; set AWS_REGION to the bucket's")
_NO_BUCKET = Advice(ConfigError, "no such bucket; create it, this program never does")
_EXPIRED = Advice(
    TransientError,
    "the session token has expired, and reading the credentials anew did not help",
    renew=True,
)
_BUSY = Advice(TransientError, "the server is busy or faulty, and asking again did not help", True)
_RACE = Advice(TransientError, "other writers of the same object kept the server from it", True)
_DAMAGED = Advice(TransientError, "the data were damaged on the way, again and again", True)
_FULL = Advice(TransientError, "quota or disk of the store is used up; free some and run again")
_SKEW = Advice(ConfigError, "this machine's clock differs too much from the server's; set it")
_GONE = Advice(ArtifactError, "no such artifact")
_UNKNOWN_CALL = Advice(
    ConfigError,
    "the server does not know this call or header; without additional checksums "
    "(AWS_REQUEST_CHECKSUM_CALCULATION=when_required) it may",
)

_BY_CODE = {
    "AccessDenied": _DENIED,
    "AllAccessDisabled": _DENIED,
    "Forbidden": _DENIED,
    "403": _DENIED,
    "InvalidAccessKeyId": _KEYS,
    "SignatureDoesNotMatch": _KEYS,
    "401": _KEYS,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "PermanentRedirect": _REGION,
    "301": _REGION,
    "NoSuchBucket": _NO_BUCKET,
    "InvalidBucketName": _NO_BUCKET,
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "InvalidToken": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "RequestTimeTooSkewed": _SKEW,
    "RequestExpired": _SKEW,
    "QuotaExceeded": _FULL,
    "InsufficientStorage": _FULL,
    "XMinioStorageFull": _FULL,
    "507": _FULL,
    "SlowDown": _BUSY,
    "Throttling": _BUSY,
    "ThrottlingException": _BUSY,
    "RequestLimitExceeded": _BUSY,
    "TooManyRequests": _BUSY,
    "RequestTimeout": _BUSY,
    "InternalError": _BUSY,
    "ServiceUnavailable": _BUSY,
    "ConditionalRequestConflict": _RACE,
    "OperationAborted": _RACE,
    "BadDigest": _DAMAGED,
    "XAmzContentSHA256Mismatch": _DAMAGED,
    "IncompleteBody": _DAMAGED,
    "NoSuchKey": _GONE,
    "404": _GONE,
    "InvalidObjectState": Advice(ArtifactError, "archived; restore it first"),
    "NotImplemented": _UNKNOWN_CALL,
    "MethodNotAllowed": _UNKNOWN_CALL,
}
_OTHER = Advice(ConfigError, "the server refused the request")

_NO_KEYS = Advice(
    ConfigError, "no credentials; give a role, AWS_PROFILE or AWS_ACCESS_KEY_ID (boto3's chain)"
)
_BY_TYPE: tuple[tuple[type[BotoCoreError], Advice], ...] = (
    (boto.NoCredentialsError, _NO_KEYS),
    (boto.PartialCredentialsError, _NO_KEYS),
    (boto.ProfileNotFound, _NO_KEYS),
    (boto.CredentialRetrievalError, Advice(TransientError, "the credentials cannot be had", True)),
    (boto.SSLError, Advice(ConfigError, "TLS failed; a CA of your own goes into AWS_CA_BUNDLE")),
    (boto.ParamValidationError, Advice(ConfigError, "not a valid bucket or key")),
    (boto.NoRegionError, _REGION),
    (boto.ConnectTimeoutError, Advice(TransientError, "the endpoint cannot be reached", True)),
    (boto.EndpointConnectionError, Advice(TransientError, "the endpoint cannot be reached", True)),
    (boto.ProxyConnectionError, Advice(TransientError, "the proxy cannot be reached", True)),
    (boto.HTTPClientError, Advice(TransientError, "the connection broke, again and again", True)),
    (boto.IncompleteReadError, Advice(TransientError, "answers were cut, again and again", True)),
    # Of older releases, not below HTTPClientError:
    (boto.ResponseStreamingError, Advice(TransientError, "answers were cut off", True)),
)


def error_code(error: BaseException) -> str:
    """S3's error code, `404` and the like for an answer without a body; empty for others."""
    return str(error.response["Error"].get("Code", "")) if isinstance(error, ClientError) else ""


def judge(error: BotoCoreError | ClientError, *, what: str, place: Place) -> Judgement:
    """The error to raise for a failed request about `what`, and whether to ask again first."""
    if isinstance(error, ClientError):
        code = error_code(error)
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        advice = _BY_CODE.get(code) or _BY_CODE.get(str(status)) or _by_status(status)
        said = f"{code} {error.response['Error'].get('Message', '')}".strip()
    else:
        advice = next((entry for kind, entry in _BY_TYPE if isinstance(error, kind)), _OTHER)
        said = type(error).__name__
    message = f"{what}: {advice.text} ({place}; {said})"
    return Judgement(advice.kind(message), advice.again, advice.renew)


def _by_status(status: int) -> Advice:
    return _BUSY if status >= 500 or status == 429 else _OTHER
