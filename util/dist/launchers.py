"""The variables of torchrun (RANK, WORLD_SIZE, ...), made from what other launchers and flags say."""

import re
import zlib
from collections.abc import Mapping

# Open MPI's names of torchrun's variables.
OPENMPI = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
}


def slurm_ranks(environ: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables made from srun's, for a main that `srun` starts directly.

    Returns {} if torchrun's variables are set, and for a batch script or an interactive shell within an
    allocation, which is not a step of several tasks: it stays one process.
    """
    if "RANK" in environ or int(environ.get("SLURM_STEP_NUM_TASKS", 1)) < 2:
        return {}
    # The port differs between jobs, steps and restarts: a rank that survived a network failure cannot join
    # the requeued job.
    incarnation = ".".join(
        environ.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT")
    )
    return {
        "RANK": environ["SLURM_PROCID"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": first_host(environ["SLURM_STEP_NODELIST"]),
        # Below 32768, where systems hand out ports for outgoing connections.
        "MASTER_PORT": str(10000 + zlib.crc32(incarnation.encode()) % 20000),
    }


def first_host(nodelist: str) -> str:
    """The first name of a SLURM host list: node[03-07,9],gpu1 -> node03."""
    # Up to the first comma outside of brackets: node[03-07,9].
    first = re.match(r"(?:[^,\[]|\[[^]]*\])+", nodelist)
    assert first is not None, nodelist
    # Each bracket becomes its first number, in which leading zeros count: node03.
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first[0])


def openmpi_ranks(environ: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables made from those of Open MPI's mpirun, as MAE makes them for `dist_on_itp`.

    Raises ValueError if mpirun has not set them.
    """
    missing = [name for name in OPENMPI.values() if name not in environ]
    if missing:
        raise ValueError(
            f"`dist_on_itp` reads the ranks from Open MPI's variables, and there is no {', '.join(missing)}: "
            "start the command by its mpirun, or leave `dist_on_itp` out"
        )
    return {ours: environ[theirs] for ours, theirs in OPENMPI.items()}


def flag_ranks(
    environ: Mapping[str, str], dist_url: str, world_size: int | None
) -> tuple[dict[str, str], list[str]]:
    """torchrun's variables made from MAE's flags, and a line on each flag that has no effect.

    Args:
        environ: the environment, with what the launcher has set.
        dist_url: "env://", or tcp://HOST:PORT, where rank 0 waits for the others.
        world_size: number of ranks, or None. It counts if a rank is set and their number is not.

    Raises ValueError for other addresses.
    """
    found: dict[str, str] = {}
    notes: list[str] = []
    if world_size is not None and "WORLD_SIZE" in environ:
        if int(environ["WORLD_SIZE"]) != world_size:
            notes.append(
                f"`world_size` {world_size} has no effect: the launcher has started "
                f"{environ['WORLD_SIZE']} processes"
            )
    elif world_size is not None and "RANK" in environ:
        found["WORLD_SIZE"] = str(world_size)
    elif world_size is not None and world_size > 1:
        notes.append(
            f"`world_size` {world_size} has no effect: this process does not know its rank and runs alone; "
            "torchrun, srun, and mpirun with `dist_on_itp` start several"
        )
    address = _address(dist_url)
    if not address:
        return found, notes
    alone = int({**environ, **found}.get("WORLD_SIZE", 1)) < 2
    # torchrun's own process holds the meeting place then, and ranks cannot open another one.
    if alone or environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        reason = "this process runs alone" if alone else "torchrun has told the processes where they meet"
        notes.append(f"`dist_url` {dist_url} has no effect: {reason}")
        return found, notes
    return found | address, notes


def _address(dist_url: str) -> dict[str, str]:
    """The variables of an address; {} for env://, which leaves them to the environment."""
    if dist_url == "env://":
        return {}
    match = re.fullmatch(r"tcp://(\[[0-9A-Fa-f:]+\]|[^:/\[\]]+):([0-9]{1,5})", dist_url)
    if match is None:
        raise ValueError(f"`dist_url` takes env:// or tcp://HOST:PORT, found {dist_url}")
    return {"MASTER_ADDR": match[1].strip("[]"), "MASTER_PORT": match[2]}
