"""Publish certificates: a data set card, the rows, the manifest without local paths and the report, to Hugging Face.

With --to the same goes into a folder, to be looked at first. A run that is unfinished, or in which the audit finds
something, is refused.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path

from core.errors import ConfigError, DataError
from distributed.store.run_directory import RunDirectory
from jobs._cli import job_parser, open_run, run_job


def main() -> int:
    """Command line."""
    parser = job_parser("publish", __doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--repo", metavar="OWNER/NAME", help="a data set of Hugging Face, made if it is not there")
    where.add_argument("--to", metavar="FOLDER", type=Path, help="a new or empty folder instead")
    parser.add_argument("--private", action="store_true", help="a data set that is made is private")
    parser.add_argument(
        "--anyway", action="store_true", help="also what is unfinished or fails its audit: the card says so"
    )

    def run(args: argparse.Namespace) -> None:
        if args.to is not None and args.to.exists() and (not args.to.is_dir() or any(args.to.iterdir())):
            raise ConfigError(f"--to: {str(args.to)!r} is not an empty folder: name a new one")
        if args.repo is not None:
            check_hub(args.repo)
        directory = open_run(args)
        said = examined(directory, args.anyway)
        if args.to is not None:
            write(directory, args.to, said)
            print(f"published: {args.to}/README.md and what it describes")
            return
        with tempfile.TemporaryDirectory() as aside:
            write(directory, Path(aside), said)
            print(f"published: {push(Path(aside), args.repo, args.private)}")

    return run_job(parser, run)


def check_hub(repo: str) -> None:
    """Refuse, before any work, a name that the hub does not take, or a machine without a token.

    Raises:
        ConfigError: says what to do.
    """
    from huggingface_hub import get_token

    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo):
        raise ConfigError(f"--repo: expected OWNER/NAME, got {repo!r}")
    if get_token() is None:
        raise ConfigError("--repo: there is no token of Hugging Face: set HF_TOKEN, or `hf auth login`; or use --to")


def examined(directory: RunDirectory, anyway: bool) -> str:
    """What the card says of the run and its audit.

    Raises:
        DataError: for a run that is not to be published, unless `anyway`.
    """
    from distributed.checks.audit import audit
    from distributed.views.publication import unfinished_stores

    problems = [f"{store} is not finished" for store in unfinished_stores(directory)]
    rows = 0
    if not problems or anyway:
        print("auditing all rows", flush=True)
        findings, checked = audit(directory)
        rows = sum(checked.values())
        problems += [f"the audit found {finding}" for finding in findings]
    if not problems:
        return f"Audited: all {rows:,} rows follow from their votes, each planned row is there once."
    first = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
    if not anyway:
        raise DataError(f"not published: {first} (jobs.pipeline finishes a run, jobs.audit says more; or --anyway)")
    return f"NOT TO BE RELIED ON. Published although: {first}."


def write(directory: RunDirectory, target: Path, said: str) -> None:
    """All files, into a local folder."""
    from distributed.views.publication import public, write_publication
    from jobs.report import prepared, require_matplotlib

    require_matplotlib()
    data, sections = prepared(directory, public(directory.manifest), images=False)
    files = write_publication(directory, data, sections, target, public(said))
    print(f"{len(files):,} files of rows, the card, the manifest and the report")


def push(folder: Path, repo: str, private: bool) -> str:
    """Upload in one commit; rows that an earlier one published are removed by it.

    Returns:
        The address of the data set.

    Raises:
        DataError: says what the hub answered.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        where = api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder, repo_type="dataset", commit_message="Certificates of dual-rs",
            delete_patterns=["certificates/*", "report/*"],
        )  # fmt: skip
    except (HfHubHTTPError, HFValidationError) as error:
        raise DataError(f"the hub refused {repo!r}: {' '.join(str(error).split())}") from error
    return str(where)


if __name__ == "__main__":
    sys.exit(main())
