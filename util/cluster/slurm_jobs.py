"""Submitting runs to SLURM through submitit: arrays of points, and a job for each follow-up."""

import contextlib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from util.cluster import slurm
from util.cluster.job import ROOT, Resources
from util.cluster.job_dir import add_job_ids, locked, read_job_ids, write_flags
from util.cluster.status import queue
from util.cluster.sweep import Point, parse_main
from util.flags.groups import MOST_WORKERS
from util.flags.parser import given_in

if TYPE_CHECKING:
    import submitit

GPUS_PER_NODE = 8
# Seconds between SLURM's warning and the end. They must suffice for the slowest step and for writing the
# checkpoint of a huge model.
WARNING_SECONDS = 120
# SLURM's own default of MaxArraySize, the number of points in one array.
ARRAY_SIZE = 1001
NO_SLURM = (
    "this machine has no SLURM ({}): give `cluster` local to run on this machine, or submit where SLURM is"
)


def _limit(name: str, default: int) -> int:
    """Return a limit of the cluster, the default if SLURM does not say it."""
    found = re.search(rf"^{name}\s*=\s*(\d+)", slurm.query("scontrol", "show", "config"), re.M)
    if found is None:
        return default
    return int(found[1])


def check_limits(points: list[Point]) -> None:
    """Raise ValueError if there is no cluster, or if it cannot hold the jobs of points and follow-ups."""
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise ValueError(NO_SLURM.format("no sbatch and srun on PATH"))
    # Before anything is written.
    try:
        slurm.query("scontrol", "show", "config", required=True)
    except ValueError as error:
        # SLURM is installed, and no file or server says where its controller is.
        if "configuration source" in str(error):
            raise ValueError(NO_SLURM.format("scontrol finds no configuration")) from None
        raise ValueError(f"{error}, or give `cluster` local to run on this machine") from None
    jobs = sum(1 + len(point.then) for point in points)
    most = _limit("MaxJobCount", jobs)
    if jobs > most:
        raise ValueError(
            f"the command makes {jobs} jobs, but the cluster holds {most} at a time (its MaxJobCount): "
            "submit some of the points with `only`, and the others when these have ended"
        )


def arrays_of(points: list[Point]) -> list[list[Point]]:
    """Split points into arrays that the cluster accepts."""
    # 0 turns arrays off.
    size = max(1, _limit("MaxArraySize", ARRAY_SIZE))
    return [points[i : i + size] for i in range(0, len(points), size)]


def sbatch_options(points: list[Point], resources: Resources) -> dict[str, Any]:
    """Return the options of a job in submitit's names. The first point stands for all of them."""
    first = points[0]
    ngpus = resources.ngpus
    if ngpus is None:
        ngpus = GPUS_PER_NODE
    cpus = resources.cpus_per_task
    if not cpus:
        # A core for the training loop and one for each data worker.
        cpus = _data_workers(first) + 1
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


def _data_workers(point: Point) -> int:
    """Return the number of data workers of a rank. The check of a cluster has none."""
    flags = parse_main(point.main, point.argv)
    if "num_workers" not in vars(flags):
        return 0
    # The default is that of this machine, and the job gets as many cores as are asked for here.
    if "num_workers" not in given_in(flags):
        return MOST_WORKERS
    return flags.num_workers


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
    """Return the sbatch script of a submission, of the first array if there are several.

    It needs no SLURM on this machine.
    """
    import submitit

    class Preview(submitit.SlurmExecutor):
        # submitit refuses an executor whose affinity is negative, as it is without srun.
        affinity = classmethod(lambda cls: 1)

    executor = Preview(folder=os.path.join(job_dir, "submitit", "%j"))
    executor.update_parameters(**sbatch_options(points, resources))
    first, *others = arrays_of(points)
    # In a submission, submitit sets the size of an array itself.
    if len(first) > 1:
        executor.parameters["map_count"] = len(first)
    command = "python -m submitit.core._submit " + shlex.quote(job_dir + "/submitit")
    text = executor._make_submission_file_text(command, "preview")
    for array in others:
        text += f"# The same again with {len(array)} more points, as an array of the cluster is full.\n"
    return text


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
        # By this submission.
        self.submitted = 0

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

    def submit_arrays(self, points: list[Point]) -> None:
        """Submit points as job arrays.

        With a limit on parallel runs, an array starts when the one before it has ended. Raises ValueError if
        SLURM refuses an array. Those before it stay submitted.
        """
        after = ""
        for array in arrays_of(points):
            executor = make_executor(array, self.resources, self.job_dir)
            if after and self.resources.max_parallel:
                _start_after(executor, f"afterany:{after}")
            jobs = self._submit_array(array, executor)
            after = jobs[0].partition("_")[0]

    def _submit_array(self, points: list[Point], executor: "submitit.SlurmExecutor") -> list[str]:
        with _without_leftovers(self.job_dir), slurm.submission_errors(), executor.batch():
            jobs = [executor.submit(point.job()) for point in points]
        for point, job in zip(points, jobs):
            label = point.label.replace("%j", job.job_id)
            print(f"{label}: job {job.job_id}, log {job.paths.stdout}")
        self.job_dir = self.job_dir.replace("%j", jobs[0].job_id)
        self._note({point.name: job.job_id for point, job in zip(points, jobs)})
        write_flags(points)
        return [job.job_id for job in jobs]

    def _note(self, jobs: dict[str, str]) -> None:
        for run, job in jobs.items():
            self.job_ids.setdefault(run, []).append(job)
        self.submitted += len(jobs)
        add_job_ids(Path(self.job_dir), jobs)

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
            _start_after(executor, f"afterok:{after}", kill_on_invalid_dep="yes")
        with _without_leftovers(self.job_dir), slurm.submission_errors():
            job = executor.submit(point.job())
        print(f"{point.name}: job {job.job_id}{dependency}, log {job.paths.stdout}")
        # Written after each job, because SLURM may refuse the next one.
        self._note({point.name: job.job_id})


def _start_after(executor: "submitit.SlurmExecutor", condition: str, **options: str) -> None:
    """Make the jobs of an executor wait for other jobs of this submission.

    These wait for the user's own dependency already, if there is one.
    """
    additional = executor.parameters["additional_parameters"] | options
    additional.pop("dependency", None)
    executor.update_parameters(dependency=condition, additional_parameters=additional)


@contextlib.contextmanager
def _without_leftovers(job_dir: str) -> Iterator[None]:
    """Remove the stored jobs that submitit wrote for a submission, if SLURM refuses it.

    The launcher must have the lock of the job directory, because those of others look the same.
    """
    stored = Path(job_dir, "submitit")
    before = set(stored.glob("*.pkl"))
    try:
        yield
    except ValueError:
        for path in set(stored.glob("*.pkl")) - before:
            path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _alone(job_dir: str) -> Iterator[None]:
    """Let one launcher at a time submit to a job directory: two would submit the same runs."""
    if "%j" in job_dir:
        # The folder has a name only when SLURM has the job. No other launcher can have it.
        yield
        return
    folder = Path(job_dir, "submitit")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock"):
        yield


def submit_to_slurm(points: list[Point], resources: Resources, job_dir: str) -> int:
    """Submit the points that are neither finished nor queued, and their follow-ups. Returns exit code 0.

    Raises ValueError if SLURM does not answer or refuses a job.
    """
    with _alone(job_dir):
        submission = SlurmSubmission(resources, job_dir)
        selected = submission.select(points)
        # Made even if no point is selected, so that wrong options are reported in any case.
        make_executor(selected or points, resources, job_dir)
        names = {point.name for point in selected}
        try:
            submission.submit_arrays(selected)
            for point in points:
                submission.submit_follow_ups(point, submitted_now=point.name in names)
        except ValueError as error:
            if not submission.submitted:
                raise
            raise ValueError(
                f"{error}. {submission.submitted} jobs are submitted; the same command again submits the "
                "others"
            ) from error
        # Of earlier submissions, which may have been killed before they wrote them.
        write_flags([point for point in points if not Path(point.folder, "flags.json").exists()])
    print(f"status: python {os.path.basename(sys.argv[0])} --status {submission.job_dir}")
    return 0
