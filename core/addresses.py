"""Addresses such as `s3://bucket/key`: none that carries a secret is taken, and none is ever shown with one.

Addresses end in messages, logs, locks and manifests: one with a secret is refused where it comes in, not hidden where
it goes out.
"""

import re
import urllib.parse
from typing import Final

from core.errors import ConfigError

__all__ = ["check_address", "is_address", "shown"]

_PUBLIC: Final = frozenset(
    {
        "blob_storage_authority", "blob_storage_scheme", "buffer_size", "default_block_size", "dfs_storage_authority",
        "dfs_storage_scheme", "enable_tls", "endpoint_override", "project_id", "region", "replication",
        "retry_limit_seconds", "scheme",
    }
)  # fmt: skip
"""Options of pyarrow's file systems that hold no secret. Of the others nobody knows (`token`, `X-Amz-Signature`)."""
_KEYS_AS_USERS: Final = ("gcs", "gs", "hf", "http", "https", "s3")
"""Where a name before the host is a key or a token; elsewhere it is a user, or Azure's container."""


def is_address(text: str) -> bool:
    """Whether it is an address, and not a local path."""
    return "://" in text


def shown(text: str) -> str:
    """What messages may show of an address: no user, no password, no query. Other text stays as it is."""
    scheme, sign, rest = text.partition("://")
    if not sign:
        return text
    host, path = _split(rest)
    path = re.sub(r"[?#].*", "?***", path, flags=re.DOTALL)
    inside, at, host = host.rpartition("@")
    if not re.fullmatch(r"[^:@]*(:\d*)?|\[[^@]*\](:\d*)?", host) or (at and "@" in path):
        return f"{scheme}://***"  # a password with a / or ? in it: nobody can say where it ends
    return f"{scheme}://{'***@' if inside or at else ''}{host}{path}"


def check_address(text: str, key: str = "") -> None:
    """Refuse an address that holds what may be a secret; local paths pass.

    Args:
        text: a path or an address.
        key: of the configuration, for the message.

    Raises:
        ConfigError: says what it holds, never with its value.
    """
    if not is_address(text):
        return
    scheme, _, rest = text.partition("://")
    kind = scheme.lower().removeprefix("fsspec+")
    user, at, host = _split(rest)[0].rpartition("@")
    try:
        parts = urllib.parse.urlsplit(text)
        _ = parts.port
        query = urllib.parse.parse_qs(parts.query, keep_blank_values=True)
        fragment = parts.fragment
        malformed = ":" in host and kind in ("gcs", "gs", "hf", "s3")  # a bucket has no port
    except ValueError:
        query, fragment, malformed = {}, "", True
    held = ["something behind a #"] if fragment else []
    if ":" in user or malformed:
        held.append("a password (or a port that is none)")
    elif at and kind in _KEYS_AS_USERS and not (user == "anonymous" and kind in ("gcs", "gs")):
        held.append("a user or key")
    known = f"(known: {', '.join(sorted(_PUBLIC))})"
    for name, values in query.items():
        if name not in _PUBLIC:
            told = f", {name!r}," if any(values) else ""  # a name without a value may be the secret itself
            held.append(f"an option{told} that may be a key or a token {known}")
        elif "@" in "".join(values):
            held.append(f"a user in {name!r}")
    if held:
        raise ConfigError(
            f"{f'{key}: ' if key else ''}{shown(text)!r} holds {', '.join(held)}: no credentials in an address (logs!)"
            "; use the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, "
            "HF_TOKEN), a profile or the machine's role"
        )


def _split(rest: str) -> tuple[str, str]:
    """What is before the first / ? or #, and from there on."""
    end = re.search(r"[/?#]", rest)
    return (rest, "") if end is None else (rest[: end.start()], rest[end.start() :])
