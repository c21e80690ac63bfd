"""Submitting runs to SLURM through submitit: one array for all points, and a job for each follow-up."""

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from util.cluster import slurm
from util.cluster.job import ROOT, Resources
from util.cluster.job_dir import read_job_ids, write_job_ids
from util.cluster.status import queue
from util.cluster.sweep import Point, parse_main

if TYPE_CHECKING:
    import submitit

GPUS_PER_NODE = 8
# Seconds between SLURM's warning and the end. They must suffice for the slowest step and for writing the
# checkpoint of a huge model.
WARNING_SECONDS = 120


def sbatch_options(points: list[Point], resources: Resources) -> dict[str, Any]:
    """Return the options of a job in submitit's names. The first point stands for all of them."""
    first = points[0]
    ngpus = resources.ngpus
    if ngpus is None:
        ngpus = GPUS_PER_NODE
    cpus = resources.cpus_per_task
    if not cpus:
        # A core for the training loop and one for each data worker. The check of a cluster has no workers.
        cpus = getattr(parse_main(first.main, first.argv), "num_workers", 0) + 1
    memory = None
    if resources.mem_gb:
        memory = f"{resources.mem_gb:g}GB"
    options = dict(
        job_name=first.main.removeprefix("main_").removeprefix("util.cluster."),
        time=resources.timeout,
        nodes=resources.nodes,
        ntasks_per_node=max(1, ngpus),
        # None leaves the option out, for clusters that know no GPUs.
        gpus_per_node=ngpus or None,
        cpus_per_task=cpus,
        partition=resources.partition,
        qos=resources.qos,
        account=resources.account,
        constraint=resources.constraint,
        comment=resources.comment,
        mem=memory,
        signal_delay_s=WARNING_SECONDS,
        stderr_to_stdout=True,
        # Without --kill-on-bad-exit, the ranks that survive a failed one hang until the time limit. srun does
        # not inherit --cpus-per-task from sbatch since SLURM 22.05.
        srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={cpus}"],
        setup=[f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"],
        array_parallelism=resources.max_parallel or len(points),
        additional_parameters={"requeue": True} | _sbatch_words(resources.sbatch),
    )
    return {name: value for name, value in options.items() if value is not None}


def _sbatch_words(options: Mapping[str, str]) -> dict[str, str | bool]:
    # submitit writes an option without a value, such as --exclusive, for True.
    return {name: value or True for name, value in options.items()}


def make_executor(points: list[Point], resources: Resources, job_dir: str) -> "submitit.SlurmExecutor":
    """Make submitit's executor for the jobs of these points."""
    import submitit

    executor = submitit.SlurmExecutor(folder=os.path.join(job_dir, "submitit", "%j"))
    executor.update_parameters(**sbatch_options(points, resources))
    return executor


def preview(points: list[Point], resources: Resources, job_dir: str) -> str:
    """Return the sbatch script of a submission. It needs no SLURM on this machine."""
    import submitit

    class Preview(submitit.SlurmExecutor):
        # submitit refuses an executor whose affinity is negative, as it is without srun.
        affinity = classmethod(lambda cls: 1)

    executor = Preview(folder=os.path.join(job_dir, "submitit", "%j"))
    executor.update_parameters(**sbatch_options(points, resources))
    # In a submission, submitit sets the size of an array itself.
    if len(points) > 1:
        executor.parameters["map_count"] = len(points)
    command = "python -m submitit.core._submit " + shlex.quote(job_dir + "/submitit")
    return executor._make_submission_file_text(command, "preview")


class SlurmSubmission:
    """One submission to a job directory. Runs that are finished or in the queue are not submitted again."""

    def __init__(self, resources: Resources, job_dir: str):
        self.resources = resources
        self.job_dir = job_dir
        # Run -> the IDs of its jobs, in the order of submission.
        self.job_ids = read_job_ids(Path(job_dir))
        latest = [jobs[-1] for jobs in self.job_ids.values()]
        # If SLURM did not answer, all runs in its queue would be submitted a second time.
        self.queued = queue(latest, required=True)

    def _is_queued(self, point: Point) -> bool:
        return self.job_ids.get(point.name, [""])[-1] in self.queued

    def select(self, points: list[Point]) -> list[Point]:
        """Return the points that are to be submitted, and print why the others are not."""
        selected = []
        for point in points:
            if self._is_queued(point):
                print(f"{point.label}: queued, not submitted again")
            elif point.job().is_finished():
                print(f"{point.label}: finished, not submitted again")
            else:
                selected.append(point)
        return selected

    def submit_array(self, points: list[Point], executor: "submitit.SlurmExecutor") -> None:
        """Submit points as one job array."""
        with slurm.submission_errors(), executor.batch():
            jobs = [executor.submit(point.job()) for point in points]
        for point, job in zip(points, jobs):
            self.job_ids.setdefault(point.name, []).append(job.job_id)
            print(f"{point.label}: job {job.job_id}, log {job.paths.stdout}")
        if jobs:
            self.job_dir = self.job_dir.replace("%j", jobs[0].job_id)
        write_job_ids(Path(self.job_dir), self.job_ids)

    def submit_follow_ups(self, point: Point, submitted_now: bool) -> None:
        """Submit the follow-ups of a point, each in a job of its own."""
        pending = submitted_now or self._is_queued(point)
        for follow_up in point.then:
            # If the point is submitted again, so are its follow-ups: SLURM has cancelled those of
            # the failed job.
            if not submitted_now and self._is_queued(follow_up):
                print(f"{follow_up.name}: queued, not submitted again")
            elif not pending and follow_up.job().is_finished():
                print(f"{follow_up.name}: finished, not submitted again")
            elif pending:
                self._submit_follow_up(follow_up, after=self.job_ids[point.name][-1])
            else:
                self._submit_follow_up(follow_up)

    def _submit_follow_up(self, point: Point, after: str = "") -> None:
        """Submit a follow-up that starts once the job `after` has succeeded, or at once."""
        executor = make_executor([point], self.resources, self.job_dir)
        dependency = ""
        if after:
            dependency = f" after {after}"
            # Without the option, the follow-up of a failed job stays in the queue for ever.
            options = executor.parameters["additional_parameters"] | {"kill-on-invalid-dep": "yes"}
            executor.update_parameters(dependency=f"afterok:{after}", additional_parameters=options)
        with slurm.submission_errors():
            job = executor.submit(point.job())
        self.job_ids.setdefault(point.name, []).append(job.job_id)
        # Written after each job, because SLURM may refuse the next one.
        write_job_ids(Path(self.job_dir), self.job_ids)
        print(f"{point.name}: job {job.job_id}{dependency}, log {job.paths.stdout}")


def submit_to_slurm(points: list[Point], resources: Resources, job_dir: str) -> int:
    """Submit the points that are neither finished nor queued, and their follow-ups. Returns exit code 0.

    Raises ValueError if SLURM does not answer or refuses a job.
    """
    submission = SlurmSubmission(resources, job_dir)
    selected = submission.select(points)
    # Made even if no point is selected, so that wrong options are reported in any case.
    executor = make_executor(selected or points, resources, job_dir)
    submission.submit_array(selected, executor)
    names = {point.name for point in selected}
    for point in points:
        submission.submit_follow_ups(point, submitted_now=point.name in names)
    print(f"status: python {os.path.basename(sys.argv[0])} --status {submission.job_dir}")
    return 0
