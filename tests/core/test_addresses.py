"""No address with a secret comes in, and no message that refuses one repeats it."""

import pytest

from core.addresses import check_address, shown
from core.config import parse_config
from core.errors import ConfigError
from distributed.files.storage import Folder, file_system
from distributed.files.stores import endpoint

MINIMAL = {"sigmas": [0.5], "report": {"radii": [0]}}
HUSHS = [
    "s3://key:HUSH@bucket/run",
    "s3://HUSH@bucket/run",
    "s3://key:SEC/HUSH@bucket/run",
    "s3://key:SEC?HUSH@bucket/run",
    "s3://key:SEC#HUSH@bucket/run",
    "s3://key@HUSH:x/HUSH@bucket/run",
    "S3://key:HUSH@bucket/run",
    "gs://user:HUSH@bucket/run",
    "gs://:HUSH@bucket/run",
    "gs://HUSH@bucket/run",
    "gs://bucket/run?access_token=HUSH",
    "gs://bucket/run?access_token=x@HUSH",
    "gs://bucket/run?HUSH",
    "s3://bucket/run#HUSH",
    "gcs://bucket/run?scheme=http&token=HUSH",
    "hf://HUSH@datasets/user/name",
    "https://user:HUSH@host/file?x=HUSH",
    "https://host/file?X-Amz-Signature=HUSH#HUSH",
    "http://HUSH@host/file",
    "abfss://container:HUSH@account/x",
    "abfs://account/x?sig=HUSH",
    "fsspec+https://host/file?token=HUSH",
    "fsspec+ftp://user:HUSH@host/file",
    "hdfs://user:HUSH@host:8020/x",
    "s3://bucket/run?endpoint_override=http://user:HUSH@host:9000",
]


@pytest.mark.parametrize("address", HUSHS)
def test_check_address_with_a_secret_is_refused_without_it(address: str) -> None:
    assert "HUSH" not in shown(address)
    with pytest.raises(ConfigError, match="no credentials in an address") as caught:
        check_address(address)
    assert "HUSH" not in str(caught.value)
    for entry in (Folder, file_system):
        with pytest.raises(ConfigError) as caught:
            entry(address)
        assert "HUSH" not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["dataset.path", "dataset.train.path", "dataset.test.path", "base.denoiser", "base.classifier.checkpoint"]
)
def test_configuration_with_a_secret_in_an_address_is_refused_without_it(key: str) -> None:
    with pytest.raises(
        ConfigError, match=f"{key}(\\.checkpoint)?: 'gs://\\*\\*\\*@bucket/x' holds a password"
    ) as caught:
        parse_config(MINIMAL, ["dataset.name=cifar10", "dataset.path=d", f"{key}=gs://user:HUSH@bucket/x"])
    assert "HUSH" not in str(caught.value)
    with pytest.raises(ConfigError, match="expected key=value") as caught:
        parse_config(MINIMAL, ["gs://user:HUSH@bucket/x"])
    assert "HUSH" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "data/a:b@c?d",
        "s3://bucket/a:b@c/run?endpoint_override=host:9000&scheme=http&region=x",
        "gs://anonymous@bucket/run?retry_limit_seconds=5",
        "hf://datasets/user/name@revision/data",
        "hdfs://user@host:8020/x",
        "abfss://container@account.dfs.core.windows.net/x",
        "file:///tmp/x",
    ],
)
def test_check_address_without_a_secret_passes(address: str) -> None:
    check_address(address)


def test_shown_keeps_what_is_no_secret() -> None:
    assert shown("data/a:b@c?d") == "data/a:b@c?d"
    assert shown("s3://bucket/a b/run") == "s3://bucket/a b/run"
    assert shown("gs://user:x@bucket/run?token=y") == "gs://***@bucket/run?***"
    assert shown("hdfs://host:8020/x") == "hdfs://host:8020/x"


def test_endpoint_with_a_user_is_refused_without_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:HUSH@host:9000")
    with pytest.raises(ConfigError, match=r"AWS_ENDPOINT_URL is 'http://\*\*\*@host:9000'") as caught:
        endpoint("s3://bucket/run")
    assert "HUSH" not in str(caught.value)
