"""An object store for the tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.helpers.s3 import FlakyProxy, s3_server


@pytest.fixture(scope="package")
def server() -> Iterator[FlakyProxy]:
    with s3_server() as proxy:
        yield proxy
