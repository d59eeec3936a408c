"""Launcher: this process's place in a job, from the variables that its launcher has set. Nothing else reads them.

`deepspeed`, torchrun and `accelerate launch` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. srun and
mpirun set variables of their own, which are translated into those, for DeepSpeed too. Imports no torch.
"""

from __future__ import annotations

import os
import re
import sys
from typing import NamedTuple

STARTERS = "deepspeed, torchrun, accelerate launch or srun"
_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# of Open MPI, and of MPICH's and Intel's mpirun: the process's rank, all processes, and both on its machine
_MPIRUN = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
_OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
# below those that systems hand out by themselves, from 32768 on
_PORTS = range(20_000, 32_000)


class Place(NamedTuple):
    """A process's number among those of the job, how many there are, and its number on its machine."""

    rank: int
    world_size: int
    local_rank: int


def read_place() -> Place:
    """This process's place in the job; without a launcher, the only one. Variables of srun and mpirun are translated.

    Raises:
        ValueError: a variable is missing, no number or out of range.
    """
    if os.environ.get("WORLD_SIZE") != "1" and "RANK" not in os.environ:
        os.environ.update(_from_mpirun() or _from_srun())
    if "WORLD_SIZE" not in os.environ:
        if _number("RANK", 0):
            raise ValueError(
                f"RANK is {os.environ['RANK']} but WORLD_SIZE is not set; unset RANK, or start with {STARTERS}"
            )
        return Place(0, 1, 0)
    world_size = _number("WORLD_SIZE", 1, at_least=1)
    missing = [name for name in _NEEDED if not os.environ.get(name)]
    if missing and world_size > 1:
        raise ValueError(
            f"WORLD_SIZE is {world_size} but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set; "
            f"start with {STARTERS}, or unset WORLD_SIZE"
        )
    here = Place(_number("RANK", 0), world_size, _number("LOCAL_RANK", 0))
    for name, value in (("RANK", here.rank), ("LOCAL_RANK", here.local_rank)):
        if value >= world_size:
            raise ValueError(
                f"{name} is {value} but WORLD_SIZE is {world_size}, and ranks count from 0; start with {STARTERS}, or "
                f"set {name} below {world_size}"
            )
    if world_size > 1 and not 0 < _number("MASTER_PORT", 0) < 2**16:
        raise ValueError(f"MASTER_PORT is {os.environ['MASTER_PORT']}; use a free port from 1 to 65535")
    return here


def local_rank() -> int:
    """This process's number on its machine."""
    return _number("LOCAL_RANK", 0)


def ranks_of_machine() -> int:
    """How many ranks of the job run on this machine, as far as the launcher says."""
    return _number("LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in os.environ else "LOCAL_SIZE", 1, at_least=1)


def speaker() -> int:
    """The rank that an error message names; 0 outside a job, also where the variables are wrong."""
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() and "WORLD_SIZE" in os.environ else 0


def _number(name: str, default: int, *, at_least: int = 0) -> int:
    text = os.environ.get(name, str(default))
    try:
        number = int(text)
    except ValueError:
        number = at_least - 1
    if number < at_least:
        raise ValueError(
            f"{name} is {text!r}, but a launcher sets it to a number of at least {at_least}; start with {STARTERS}, or "
            f"unset {name}"
        )
    return number


def _from_mpirun() -> dict[str, str]:
    """Our variables of a process that mpirun has started; mpirun does not say where rank 0 is."""
    for theirs in _MPIRUN:
        if all(name in os.environ for name in theirs) and _number(theirs[1], 1) > 1:
            return {ours: os.environ[name] for ours, name in zip(_OURS, theirs, strict=True)}
    return {}


def _from_srun() -> dict[str, str]:
    """Our variables of a task that srun has started beside others.

    SLURM_NTASKS alone says nothing: sbatch and salloc set it for scripts and shells that are no task of a step.

    Raises:
        ValueError: a shell inside a step of several tasks, or a WORLD_SIZE that is not theirs.
    """
    tasks = _number("SLURM_STEP_NUM_TASKS", 1)
    if tasks < 2:
        return {}
    if sys.stdin is not None and sys.stdin.isatty():
        raise ValueError(
            f"srun has started {tasks} tasks (SLURM_STEP_NUM_TASKS) and this one has a terminal, so it is not known "
            "whether the others train too; start with srun without --pty, or set WORLD_SIZE=1 to train in this one "
            "alone"
        )
    if os.environ.get("WORLD_SIZE", str(tasks)) != str(tasks):
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']!r} but srun has started {tasks} tasks; unset WORLD_SIZE, or set "
            "it to 1 to train in each of them alone"
        )
    local = _number("SLURM_LOCALID", 0)
    visible = next((os.environ[name] for name in _VISIBLE_DEVICES if os.environ.get(name)), "")
    variables = {
        "RANK": str(_number("SLURM_PROCID", 0)),
        "WORLD_SIZE": str(tasks),
        # a task that was given one GPU sees it as its first
        "LOCAL_RANK": "0" if visible and "," not in visible else str(local),
        "LOCAL_WORLD_SIZE": _tasks_of_node(),
    }
    return {**variables, "MASTER_ADDR": _first_node(), "MASTER_PORT": _port(), **_set("MASTER_ADDR", "MASTER_PORT")}


def _set(*names: str) -> dict[str, str]:
    return {name: os.environ[name] for name in names if os.environ.get(name)}


def _tasks_of_node() -> str:
    """This node's entry of SLURM_STEP_TASKS_PER_NODE, such as 4(x2),3: two nodes of four tasks and one of three."""
    nodes: list[str] = []
    for entry in os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry)
        nodes += [match.group(1)] * int(match.group(2) or 1) if match else []
    node = _number("SLURM_NODEID", 0)
    return nodes[node] if node < len(nodes) else "1"


def _first_node() -> str:
    """The first name of SLURM_STEP_NODELIST, such as gpu-[003-005,7],login: the machine of task 0."""
    nodes = os.environ.get("SLURM_STEP_NODELIST", "")
    if not nodes or os.environ.get("SLURM_STEP_NUM_NODES") == "1":
        return "127.0.0.1"
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group()) if first else nodes


def _port() -> str:
    """A port that all tasks of a step choose alike and steps beside it choose differently."""
    return str(_PORTS[(31 * _number("SLURM_JOB_ID", 0) + _number("SLURM_STEP_ID", 0)) % len(_PORTS)])
