"""Fetch the published files that a configuration names to its paths, or say what to copy where there is no network."""

import argparse
import hashlib
import http.client
import shutil
import sys
import tarfile
import urllib.request
from pathlib import Path
from typing import NamedTuple

from core.config import Config, load_config
from core.errors import DataError, ModelError
from jobs._cli import EXIT_CODES, run_job


class Published(NamedTuple):
    """A file or folder as its makers publish it: `url`, or OWNER/NAME on the Hugging Face hub (and a file of it).

    Size in bytes and SHA-256 are those of the file that is fetched, where a source of ours states them.
    """

    url: str = ""
    hub: str = ""
    file: str = ""
    size: int | None = None
    sha256: str | None = None


_OPENAI = "https://openaipublic.blob.core.windows.net/diffusion"
PUBLISHED = {
    "cifar-10-batches-py": Published(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        size=170_498_071,
        sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    ),
    "cifar10_uncond_50M_500K.pt": Published(url=f"{_OPENAI}/march-2021/cifar10_uncond_50M_500K.pt"),
    "256x256_diffusion_uncond.pt": Published(
        url=f"{_OPENAI}/jul-2021/256x256_diffusion_uncond.pt",
        size=2_211_383_297,
        sha256="a37c32fffd316cd494cf3f35b339936debdc1576dad13fe57c42399a5dbc78b1",
    ),
    "vit-base-patch16-224-cifar10": Published(hub="aaraki/vit-base-patch16-224-in21k-finetuned-cifar10"),
    "beit_large_patch16_512.safetensors": Published(
        hub="timm/beit_large_patch16_512.in22k_ft_in22k_in1k", file="model.safetensors"
    ),
}
"""By the name of the file or folder that a configuration asks for."""


def run(config: Config) -> None:
    """Fetch what is missing.

    Raises:
        DataError: names what is still missing, after what to copy has been printed.
    """
    from distributed.checks.steps import steps_of
    from distributed.cluster.upload import named_files

    missing = []
    for key, name in named_files(config, steps_of(config)).items():
        target = Path(name)
        if "://" in name or target.exists():
            print(f"{key}: {name} is {'an address, which the jobs read' if '://' in name else 'there'}")
            continue
        known = PUBLISHED.get(target.name)
        try:
            if known is None:
                raise DataError("nothing is published under this name: copy your own there")
            _fetch(known, target)
            print(f"{key}: {name} is there now", flush=True)
        except (DataError, ModelError, OSError, http.client.HTTPException, tarfile.TarError) as error:
            print(f"{key}: {name} is missing ({str(error).partition(chr(10))[0]})")
            if known is not None:
                print(_advice(known, target))
            missing.append(name)
    if missing:
        raise DataError(f"{len(missing)} missing: {', '.join(missing)}; copy what is said above, or name another path")


def _advice(known: Published, target: Path) -> str:
    """What to copy from where a network is."""
    size = f", {known.size:,} bytes" if known.size else ""
    sha256 = f", SHA-256 {known.sha256}" if known.sha256 else " (no size and SHA-256 of it are known to us)"
    if known.hub:
        what, copied = f"hf download {known.hub} {known.file}".strip(), "the file" if known.file else "FOLDER"
        return f"  where a network is: {what} --local-dir FOLDER; copy {copied} to {target}"
    unpacked = f", and unpack it in {target.parent}" if known.url.endswith(".tar.gz") else f", to {target}"
    return f"  where a network is: {known.url}{size}{sha256}{unpacked}"


def _fetch(known: Published, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if known.hub:
        from core.models.hub import files_of, from_hub

        folder = from_hub(known.hub)
        for file in [Path(known.file)] if known.file else files_of(folder):
            place = target if known.file else target / file
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / file, place)
        return
    partial = target.with_name(f"{target.name}.part")
    _download(known, partial)
    if known.url.endswith(".tar.gz"):
        with tarfile.open(partial) as content:
            content.extractall(target.parent, filter="data")
        partial.unlink()
        if not target.exists():
            raise DataError(f"{known.url} holds no {target.name}")
    else:
        partial.replace(target)


def _download(known: Published, partial: Path) -> None:
    """The file at a URL, from where an earlier try has stopped; removed again where it is another one."""
    begun = partial.stat().st_size if known.sha256 and partial.exists() else 0
    if not begun or begun != known.size:
        print(f"fetching {known.url}" + (f" from byte {begun:,}" if begun else ""), flush=True)
        asked = {"Range": f"bytes={begun}-"} if begun else {}
        request = urllib.request.Request(known.url, headers=asked)  # noqa: S310 - of the table above
        with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
            with partial.open("ab" if response.status == http.HTTPStatus.PARTIAL_CONTENT else "wb") as file:
                shutil.copyfileobj(response, file, 1 << 20)
            if response.length:
                raise DataError(f"{known.url} broke off: the same command goes on from there")
    with partial.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if known.sha256 is None:
        print(f"  SHA-256 {found}: compare it with somebody else's, none is known to us")
    elif found != known.sha256:
        partial.unlink()
        raise DataError(f"{known.url} has SHA-256 {found}, expected {known.sha256}: fetch it again, or do not trust it")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m jobs.fetch", description=__doc__, epilog=EXIT_CODES)
    parser.add_argument("config", type=Path, metavar="YAML", help="configuration, such as configs/cifar10.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override configuration values")
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    return run_job(parser, lambda args: run(load_config(args.config, args.overrides)))


if __name__ == "__main__":
    sys.exit(main())
