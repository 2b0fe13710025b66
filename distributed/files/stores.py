"""The file system behind an address: S3 and Google Cloud at the endpoint that the environment names, and others."""

import configparser
import os
import urllib.parse
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.fs as pafs

from core.addresses import check_address, is_address, shown
from core.errors import ConfigError

__all__ = ["endpoint", "file_system", "store_environment"]

_REQUEST_S: Final = 20.0
"""A request that takes longer has failed; a connection has a quarter of it."""
_FORWARDED: Final = (
    "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE",
    "CLOUD_STORAGE_EMULATOR_ENDPOINT", "STORAGE_EMULATOR_HOST",
)  # fmt: skip


def file_system(location: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a local path or an address, and the path in it.

    Raises:
        ConfigError: for an address with credentials, a scheme that pyarrow does not know, or a store that cannot be
            reached.
    """
    if not is_address(location):
        return pafs.LocalFileSystem(), location.rstrip("/") or "/"
    check_address(location)
    parts = urllib.parse.urlsplit(location)
    options: dict[str, Any] = {key: values[-1] for key, values in urllib.parse.parse_qs(parts.query).items()}
    if parts.scheme == "s3":
        return _s3(location, parts, options), f"{parts.netloc}{parts.path}".rstrip("/")
    full = location
    if parts.scheme in ("gs", "gcs"):
        named = endpoint(location)
        # Its own patience is a quarter of an hour, without a word.
        options = {"retry_limit_seconds": f"{_REQUEST_S:g}"} | named | options
        user = "anonymous@" if named and "@" not in parts.netloc else ""  # an emulator knows nobody
        full = f"gs://{user}{parts.netloc}{parts.path}?{urllib.parse.urlencode(options)}"
    try:
        system, path = pafs.FileSystem.from_uri(full)
    except (pa.ArrowException, ValueError, OSError, ImportError) as error:
        raise ConfigError(
            f"cannot open {shown(location)!r}: {str(error).partition(chr(10))[0]}; expected a local path or an address "
            "such as s3://bucket/folder, gs://..., hf://datasets/NAME/SET, hdfs://... or fsspec+PROTOCOL://..."
        ) from error
    if isinstance(system, pafs.PyFileSystem):
        system = pafs.PyFileSystem(pafs.FSSpecHandler(_Told(system.handler.fs)))
    return system, path.rstrip("/")


def _s3(location: str, parts: urllib.parse.SplitResult, options: dict[str, Any]) -> pafs.FileSystem:
    if unknown := options.keys() - {"endpoint_override", "scheme", "region"}:
        raise ConfigError(f"{location!r}: unknown {sorted(unknown)}; known: endpoint_override, scheme, region")
    options = endpoint(location) | options
    if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        options.setdefault("region", region)
    if "endpoint_override" in options:
        options.setdefault("region", "us-east-1")  # of no meaning to an S3 server of one's own
    if "region" not in options:
        try:
            options["region"] = pafs.resolve_s3_region(parts.netloc)
        except OSError as error:
            raise ConfigError(f"cannot find the bucket of {location!r}: {error}") from error
    return pafs.S3FileSystem(
        connect_timeout=_REQUEST_S / 4,
        request_timeout=_REQUEST_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=3),  # the rest is `Folder`'s
        allow_delayed_open=True,  # one request for a small file, instead of a multipart upload's three
        **options,
    )


def endpoint(location: str) -> dict[str, str]:
    """What the environment says of the server behind an address: `endpoint_override` and `scheme`, or nothing.

    pyarrow itself takes no notice of AWS_ENDPOINT_URL, and a key that is meant for one server would go to another.

    Raises:
        ConfigError: for one that cannot be an endpoint.
    """
    query = urllib.parse.parse_qs(urllib.parse.urlsplit(location).query)
    if "endpoint_override" in query:
        return {}
    scheme = location.partition("://")[0].lower()
    source, text = _s3_endpoint() if scheme == "s3" else _gs_endpoint() if scheme in ("gs", "gcs") else ("", "")
    if not text:
        return {}
    try:
        parts = urllib.parse.urlsplit(text)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        known = False
    if not known or "@" in parts.netloc or parts.path.strip("/") or parts.query:
        raise ConfigError(
            f"{source} is {shown(text)!r}: expected http://host:port or https://host, without user, path and query"
        )
    return {"endpoint_override": parts.netloc, "scheme": parts.scheme}


def _s3_endpoint() -> tuple[str, str]:
    """Where the endpoint is said, and what it is, in the order of AWS's own tools."""
    if os.environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true":
        return "", ""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if text := os.environ.get(name):
            return name, text
    file = str(Path(os.environ.get("AWS_CONFIG_FILE", "~/.aws/config")).expanduser())
    profile = os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE") or "default"
    config = configparser.RawConfigParser(strict=False)
    try:
        config.read(file)
    except (configparser.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"{file!r} cannot be read: {str(error).partition(chr(10))[0]}") from error
    section = profile if profile == "default" else f"profile {profile}"
    services = f"services {config.get(section, 'services', fallback='')}"
    nested = config.get(services, "s3", fallback="").splitlines()  # `endpoint_url = ...`, indented below `s3 =`
    for key, _, text in (line.partition("=") for line in nested):
        if key.strip() == "endpoint_url":
            return f"{file}, [{services}] s3", text.strip()
    return f"{file}, [{section}] endpoint_url", config.get(section, "endpoint_url", fallback="")


def _gs_endpoint() -> tuple[str, str]:
    for name in ("CLOUD_STORAGE_EMULATOR_ENDPOINT", "STORAGE_EMULATOR_HOST"):
        if text := os.environ.get(name):
            return name, text if is_address(text) else f"http://{text}"
    return "", ""


def store_environment() -> dict[str, str]:
    """What other machines have to know of this environment to reach the same stores: no secrets."""
    found = {name: value for name in _FORWARDED if (value := os.environ.get(name))}
    if s3 := _s3_endpoint()[1]:
        found["AWS_ENDPOINT_URL_S3"] = s3
    return found


class _Told:
    """A file system of fsspec, or a file of it, whose failures are OSErrors as everywhere else.

    Each of them fails in the words of its own library (httpx and huggingface_hub behind hf://).
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_inner":  # asked for before there is one, by pickle
            raise AttributeError(name)
        value = getattr(self._inner, name)
        if not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                result = value(*args, **kwargs)
            except OSError:
                raise
            except Exception as error:
                raise OSError(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
            return _Told(result) if name == "open" else result

        return call
