"""Runs without a cluster: in this process, or in processes on this machine."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from util.cluster.job import ROOT, Resources
from util.cluster.job_dir import add_job_ids, read_job_ids
from util.cluster.sweep import Point, parse_main

POLL_SECONDS = 0.2


def run_here(points: list[Point]) -> int:
    """Run points and their follow-ups one after the other in this process.

    Returns 0, or the exit code of the first run that has not finished. The runs after it are not started.
    """
    for point in points:
        for run in (point, *point.then):
            job = run.job()
            if job.is_finished():
                print(f"{run.folder}: finished, not run again")
                continue
            try:
                job()
            except SystemExit as stopped:
                # Job exits with STOPPED if a signal has stopped the run.
                return int(stopped.code or 0)
    return 0


@dataclass
class _Running:
    """A run in a slot of the pool: its job, and the runs that follow it there."""

    point: Point
    job: Any  # of submitit
    then: list[Point]


class LocalPool:
    """Runs chains of points in processes on this machine, a fixed number at a time, each with its own GPUs.

    A chain is a run and its follow-ups. It ends if one of its runs fails. Raises ValueError if the jobs.json
    of the folder is damaged.
    """

    def __init__(self, resources: Resources, job_dir: str):
        import submitit
        import torch

        self.available = torch.cuda.device_count()
        self.ngpus = self.available
        if resources.ngpus is not None:
            self.ngpus = resources.ngpus
        self.timeout = resources.timeout
        self.job_dir = job_dir
        # Damage is found before the first run starts.
        read_job_ids(Path(job_dir))
        self.executor = submitit.LocalExecutor(folder=os.path.join(job_dir, "submitit", "%j"))
        self.slots: list[_Running | None] = [None] * (resources.max_parallel or 1)
        self.failed = 0

    def run(self, chains: list[list[Point]]) -> int:
        """Run all chains. Returns the number of failed runs."""
        waiting = list(chains)
        while waiting or any(self.slots):
            for slot in range(len(self.slots)):
                self._collect(slot)
                # A chain whose runs are all finished leaves the slot free for the next one.
                while self.slots[slot] is None and waiting:
                    self._start(slot, waiting.pop(0))
            # submitit cannot wait for the first of several jobs.
            time.sleep(POLL_SECONDS)
        return self.failed

    def _start(self, slot: int, chain: list[Point]) -> None:
        """Start the first run of a chain that is not finished, if there is one."""
        while chain and chain[0].job().is_finished():
            print(f"{chain[0].folder}: finished, not run again", flush=True)
            chain = chain[1:]
        if not chain:
            return
        point = chain[0]
        # With fewer GPUs than the slots ask for, runs share them.
        first = self.ngpus * slot
        gpus = tuple((first + i) % max(1, self.available) for i in range(self.ngpus))
        self.executor.update_parameters(
            timeout_min=self.timeout,
            tasks_per_node=max(1, self.ngpus),
            gpus_per_node=self.ngpus,
            stderr_to_stdout=True,
            visible_gpus=gpus,
        )
        job = self.executor.submit(point.job())
        # Written at once, for --status in another terminal.
        add_job_ids(Path(self.job_dir.replace("%j", job.job_id)), {point.name: job.job_id})
        folder = point.folder.replace("%j", job.job_id)
        print(f"{folder}: running, log {job.paths.stdout}", flush=True)
        self.slots[slot] = _Running(point, job, chain[1:])

    def _collect(self, slot: int) -> None:
        """Free a slot whose run has ended, and start the next run of its chain if the run has finished."""
        running = self.slots[slot]
        if running is None or not running.job.done():
            return
        # Cleared first, because the next run of the chain takes the same slot.
        self.slots[slot] = None
        job_id = running.job.job_id
        state = running.point.job().final_state(job_id)
        print(f"{running.point.folder.replace('%j', job_id)}: {state}", flush=True)
        if state == "finished":
            self._start(slot, running.then)
        else:
            self.failed += 1


def check_gpus(points: list[Point], ngpus: int | None) -> None:
    """Raise ValueError if runs on GPUs would have more processes than the machine has GPUs."""
    if ngpus is None or ngpus == 1:
        return
    import torch

    available = torch.cuda.device_count()
    if ngpus <= available:
        return
    for point in points:
        if parse_main(point.main, point.argv).device.startswith(("auto", "cuda")):
            raise ValueError(
                f"`ngpus` {ngpus} needs {ngpus} GPUs, but torch sees {available} here: leave `ngpus` out, or "
                "give `device` cpu"
            )


def run_locally(points: list[Point], resources: Resources, job_dir: str) -> int:
    """Run points and their follow-ups in processes on this machine. Returns exit code 1 if a run failed."""
    # The processes import the mains from this checkout.
    paths = [str(ROOT)]
    if os.environ.get("PYTHONPATH"):
        paths.append(os.environ["PYTHONPATH"])
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    pool = LocalPool(resources, job_dir)
    failed = pool.run([[point, *point.then] for point in points])
    return int(failed > 0)
