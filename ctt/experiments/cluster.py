"""Runs as jobs of a Slurm cluster, by the package submitit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctt.experiments.pool import train_one
from ctt.experiments.runs import Run

UNENDED = {  # states of Slurm's jobs
    "COMPLETING",
    "CONFIGURING",
    "PENDING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "RESIZING",
    "RUNNING",
    "STOPPED",
    "SUSPENDED",
}


class ClusterJob:
    """A run as a job. One that is preempted is submitted again, and goes on from its checkpoint."""

    def __init__(self, r: Run, given: Sequence[str]) -> None:
        self.run, self.given = r, list(given)

    def __call__(self) -> None:
        """Train the run."""
        train_one(self.run, self.given)

    def checkpoint(self, *arguments: Any, **options: Any) -> Any:
        """Return what submitit is to submit after a preemption."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit_all(
    runs: Sequence[Run], parameters: Sequence[str], given: Sequence[str], folder: Path, jobs: int
) -> list[str]:
    """Submit runs as one array of jobs.

    Args:
        parameters: `name=value` of submitit's executor; `cluster=local` runs them here.
        folder: what the jobs print goes there.
        jobs: at a time; 1 sets no limit.

    Returns:
        the names of the jobs.

    Raises:
        NameError, ValueError, RuntimeError: a parameter that submitit does not take, or no cluster.
        ModuleNotFoundError: submitit is not installed.
    """
    import submitit
    import yaml

    values = {}
    for text in parameters:
        name, separator, value = text.partition("=")
        if not separator:
            raise ValueError(f"{text} is no parameter of the form name=value.")
        values[name] = yaml.safe_load(value)
    executor = submitit.AutoExecutor(folder=folder, cluster=values.pop("cluster", None))
    if jobs > 1:
        values["slurm_array_parallelism"] = jobs
    executor.update_parameters(**values)
    with executor.batch():
        submitted = [executor.submit(ClusterJob(r, given)) for r in runs]
    if executor.cluster == "slurm":
        for r, job in zip(runs, submitted, strict=True):
            r.folder.parent.mkdir(parents=True, exist_ok=True)
            r.job.write_text(job.job_id, "utf-8")
    return [job.job_id for job in submitted]


def is_submitted(r: Run, folder: Path) -> bool:
    """Return whether a run has a Slurm job, of an earlier command, that waits or works.

    Args:
        folder: that of `submit_all`.

    Raises:
        ModuleNotFoundError: submitit is not installed.
    """
    import submitit

    try:
        job = submitit.SlurmJob[None](folder=folder, job_id=r.job.read_text("utf-8"))
    except FileNotFoundError:
        return False
    return job.state in UNENDED
