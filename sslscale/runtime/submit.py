"""Sends a command to a Ray cluster as a job: over Ray's job API, with this folder's files."""

from __future__ import annotations

import asyncio
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from sslscale.errors import EXIT_DONE, EXIT_FAILED, UserError

EXCLUDED = ["/runs/", "/data/", ".venv/", ".git/", "__pycache__/", "*.egg-info/"]
_OVER = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)
_POLL_SECONDS = 0.5


def submit(command: Sequence[str], *, address: str, folder: Path, wait: bool = True) -> int:
    """Runs `sslscale COMMAND` on the cluster's head, with the files of `folder` as its working directory.

    Streams what it prints, and returns its exit code; without `wait`, 0 once it is accepted. Runs, data, environments
    and git's own files are left out of the package. UserError where the cluster cannot be reached or refuses.
    """
    logging.getLogger("ray").setLevel(logging.WARNING)  # it tells of every file that it leaves out
    client = _connect(address)
    entrypoint = shlex.join(["python", "-m", "sslscale.cli", *command])
    environment = {"working_dir": str(folder), "excludes": EXCLUDED, "env_vars": {"PYTHONUNBUFFERED": "1"}}
    try:
        job = client.submit_job(entrypoint=entrypoint, runtime_env=environment)
    except (RuntimeError, ValueError) as error:  # the package is too large, or the cluster does not take it
        raise UserError("the cluster did not take the job", got=str(error).strip().splitlines()[-1]) from None
    _say(f"submitted {job} to {address}: {entrypoint}")
    _say("paths are the cluster's: a relative --run lies in the job's own copy of this folder, on the head")
    if not wait:
        _say(f"follow it:  ray job logs --address {address} --follow {job}")
        return EXIT_DONE
    try:
        details = asyncio.run(_follow(client, job))
    except KeyboardInterrupt:
        _say(f"the job goes on; end it with: ray job stop --address {address} {job}")
        raise
    return _exit_code(details)


def _connect(address: str) -> JobSubmissionClient:
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise _refused(address, error) from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        if "401" in str(error) or "403" in str(error):
            raise _refused(address, error) from None
        raise UserError(
            "there is no Ray cluster at this address",
            got=f"{address}: {str(error).strip().splitlines()[0]}",
            allowed="http://HOST:PORT of its dashboard",
            fix="start one with `ray start --head`, or correct --address",
        ) from None


def _refused(address: str, error: Exception) -> UserError:
    return UserError(
        "the Ray cluster wants its token",
        got=f"{address}: {str(error).strip().splitlines()[0]}",
        fix="put the head's ~/.ray/auth_token at the same place here, or set RAY_AUTH_TOKEN",
    )


async def _follow(client: JobSubmissionClient, job: str) -> JobDetails:
    async for text in client.tail_job_logs(job):
        print(text, end="", flush=True)
    while (details := client.get_job_info(job)).status not in _OVER:
        await asyncio.sleep(_POLL_SECONDS)
    return details


def _exit_code(details: JobDetails) -> int:
    if details.status == JobStatus.SUCCEEDED:
        return EXIT_DONE
    _say(f"the job ended as {details.status}: {(details.message or '').partition(',')[0]}")
    return details.driver_exit_code or EXIT_FAILED


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
