"""Set-up for all tests."""

import os

# Every cluster that a test starts is its own and short-lived; Ray reads this when it is imported.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
