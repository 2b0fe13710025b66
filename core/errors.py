"""Every error that this project raises on purpose.

    DualRSError
    ├── ConfigError        a configuration that cannot be run, or does not match the run directory
    ├── DataError          an image, a label or a stored row that is not what it should be
    ├── ModelError         weights or a network that do not fit
    ├── LimitError         a limit on what a run may take is reached
    └── NoiseError         noise that is not what certificates assume

Each message says what was got, what was expected and what to do.
"""

__all__ = ["ConfigError", "DataError", "DualRSError", "LimitError", "ModelError", "NoiseError"]


class DualRSError(Exception):
    """Root of the tree: catching it catches every error that a user can mend."""


class ConfigError(DualRSError):
    """A configuration (or an argument) that cannot be run as it is."""


class DataError(DualRSError):
    """Input data or stored rows that are not what they should be."""


class ModelError(DualRSError):
    """A checkpoint that does not fit its architecture, or a network with a wrong output."""


class LimitError(DualRSError):
    """A limit on what a run may take (`compute.max_device_hours`) is reached; what is committed stays."""


class NoiseError(DualRSError):
    """Noise that is not standard normal and independent on this machine."""
