"""Where a model is: a path of this machine, or the name of one on the Hugging Face hub."""

import re
from pathlib import Path

from core.errors import ModelError

__all__ = [
    "CLASSIFIER_WEIGHTS",
    "FOLDERS",
    "WEIGHTS",
    "files_of",
    "from_hub",
    "is_hub_name",
    "local_path",
    "weights_file",
]

CLASSIFIER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Weights of a classifier in a folder of the hub, the ones that are taken first."""
WEIGHTS = (
    *("model.safetensors", "diffusion_pytorch_model.safetensors"),
    *("pytorch_model.bin", "diffusion_pytorch_model.bin"),
)
"""Files with weights in such a folder; a .bin is fetched only where there are no others."""
FOLDERS = ("", "unet", "unet_ema", "scheduler")
"""Parts of such a folder that may be read."""
_OURS = ("build", "checkpoints", "data", "dist", "docs", "models", "runs", "site", "tests")
"""Folders of working directories: `checkpoints/vit` that is not there is a missing folder, and no model of a user's."""


def is_hub_name(source: str) -> bool:
    """Whether a model can only be one of the hub: OWNER/NAME, and no file or folder that is there or should be."""
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) is None or Path(source).exists():
        return False
    path = Path(source)
    named = path.suffix in (".pt", ".pth", ".bin", ".safetensors") or path.parts[0] in _OURS
    return not named and not Path(path.parts[0]).is_dir()


def local_path(source: str | Path) -> Path:
    """The file or folder of a model: the path itself, or a folder of the hub in its cache, fetched if need be.

    Raises:
        ModelError: when it is not there, or cannot be fetched.
    """
    path = Path(source)
    if path.exists():
        return path
    if "://" in str(source):
        raise ModelError(f"{str(source)!r} is an address: the jobs fetch it; here give a file or a folder")
    if not is_hub_name(str(source)):
        raise ModelError(f"no checkpoint at {str(source)!r}; look at the path (jobs.fetch gets published files)")
    return from_hub(str(source))


def from_hub(name: str) -> Path:
    """A folder of the hub, in its cache: configurations, and weights that are no pickles where there are some.

    Raises:
        ModelError: when it cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    places = [f"{folder}/" if folder else "" for folder in FOLDERS]
    first = [f"{place}{file}" for place in places for file in ("*.json", *WEIGHTS[:2])]
    try:
        folder = Path(snapshot_download(name, allow_patterns=first))
        if not files_of(folder, WEIGHTS):
            second = [f"{place}{file}" for place in places for file in WEIGHTS[2:]]
            folder = Path(snapshot_download(name, allow_patterns=[*first, *second]))
    except Exception as error:  # of the hub, of its HTTP library, of the system
        raise ModelError(
            f"{name!r} is no path here, and as a model of the Hugging Face hub it cannot be fetched "
            f"({str(error).strip().partition(chr(10))[0]}): fetch it where there is a network "
            f"(hf download {name} --local-dir FOLDER) and name the folder"
        ) from error
    return folder


def files_of(folder: Path, names: tuple[str, ...] = ("*.json", *WEIGHTS)) -> list[Path]:
    """The files of a model's folder that may be read, relative to it: configurations, weights, or what is named."""
    found = {path for part in FOLDERS for name in names for path in (folder / part).glob(name)}
    return sorted(path.relative_to(folder) for path in found)


def weights_file(path: Path) -> Path:
    """The file with the weights: of a folder of the Hugging Face hub the one inside.

    Raises:
        ModelError: for a folder with its weights in several files.
    """
    if not path.is_dir():
        return path
    files = [path / file for file in CLASSIFIER_WEIGHTS]
    if shards := sorted(path.glob("*.index.json")) if not any(map(Path.exists, files)) else ():
        raise ModelError(
            f"{str(path)!r} has its weights in shards ({shards[0].name}): save them as {CLASSIFIER_WEIGHTS[0]}"
        )
    return next((file for file in files if file.exists()), files[0])
