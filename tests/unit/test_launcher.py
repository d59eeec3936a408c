"""The variables of launchers: what is refused by name, and srun's and mpirun's translated. No process is started."""

import io
import os
import re
import sys

import pytest

from hrf_fast.command import run_command
from hrf_fast.distributed import comm
from hrf_fast.distributed.launcher import read_place, speaker

GROUP = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "node-1", "MASTER_PORT": "29500"}
# task 5 of a step of two nodes, four tasks on each
STEP = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu-[007-008]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "8",
}
MPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


@pytest.fixture
def variables(monkeypatch):
    """The environment of a process: nothing of a launcher but what a test sets."""
    foreign = re.compile(r"(SLURM|OMPI|PMI|MPI|MASTER)_|(LOCAL_)?(RANK|WORLD_SIZE|SIZE)$|(CUDA|ROCR|HIP)_VISIBLE")
    environment = {name: value for name, value in os.environ.items() if not foreign.match(name)}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    return environment


def test_without_a_launcher_a_process_is_alone(variables):
    assert read_place() == (0, 1, 0)
    variables["RANK"] = "0"
    assert read_place() == (0, 1, 0)


def test_the_usual_variables_are_read(variables):
    variables.update(GROUP)
    assert read_place() == (1, 2, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"WORLD_SIZE": ""}, "^WORLD_SIZE is ''.* torchrun.*unset WORLD_SIZE"),
        ({"WORLD_SIZE": "two"}, "^WORLD_SIZE is 'two'.*number of at least 1"),
        ({"WORLD_SIZE": "0"}, "^WORLD_SIZE is '0'.*at least 1"),
        ({"WORLD_SIZE": None}, "^RANK is 1 but WORLD_SIZE is not set; unset RANK, or start with .*torchrun"),
        ({"RANK": None}, "^WORLD_SIZE is 2 but RANK is not set; start with"),
        ({"RANK": "", "MASTER_ADDR": ""}, "^WORLD_SIZE is 2 but RANK, MASTER_ADDR are not set"),
        ({"LOCAL_RANK": None}, "^WORLD_SIZE is 2 but LOCAL_RANK is not set"),
        ({"RANK": "x"}, "^RANK is 'x'.*unset RANK"),
        ({"RANK": "-1"}, "^RANK is '-1'.*at least 0"),
        ({"RANK": "2"}, "^RANK is 2 but WORLD_SIZE is 2, and ranks count from 0"),
        ({"LOCAL_RANK": "7"}, "^LOCAL_RANK is 7 but WORLD_SIZE is 2"),
        ({"LOCAL_RANK": "one"}, "^LOCAL_RANK is 'one'"),
        ({"MASTER_PORT": "http"}, "^MASTER_PORT is 'http'"),
        ({"MASTER_PORT": "0"}, "^MASTER_PORT is 0; use a free port"),
        ({"MASTER_PORT": "70000"}, "^MASTER_PORT is 70000; use a free port"),
        ({"WORLD_SIZE": "1"}, "^RANK is 1 but WORLD_SIZE is 1"),
    ],
)
def test_a_wrong_variable_is_named_with_the_way_out(variables, changes, message, capsys):
    variables.update(GROUP)
    for name, value in changes.items():
        if value is None:
            del variables[name]
        else:
            variables[name] = value
    with pytest.raises(ValueError, match=message):
        read_place()

    def command():
        with comm.job(600.0):
            raise AssertionError("the job began")

    # a line and no traceback
    assert run_command(command) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and re.search(message[1:], lines[0])


def test_a_variable_that_is_left_over_stops_no_command_but_training(variables):
    variables.update(GROUP, WORLD_SIZE="", RANK="x")
    # what `hrf sample`, `evaluate` and `report` ask
    assert (comm.rank(), comm.world_size(), comm.is_main(), comm.gather(3)) == (0, 1, True, [3])
    assert speaker() == 0


def test_a_task_of_srun_gets_the_usual_variables(variables):
    variables.update(STEP)
    assert read_place() == (5, 8, 1)
    # 20000 + (31·1234 + 2) mod 12000
    expected = {"MASTER_ADDR": "gpu-007", "MASTER_PORT": "22256", "LOCAL_WORLD_SIZE": "4"}
    assert {name: variables[name] for name in expected} == expected
    # for DeepSpeed, which reads them too
    assert (variables["RANK"], variables["WORLD_SIZE"], variables["LOCAL_RANK"]) == ("5", "8", "1")


def test_tasks_of_a_step_agree_on_the_port_and_other_steps_take_others(variables):
    ports = []
    for job, step, task in ((1234, 2, 0), (1234, 2, 7), (1234, 3, 0), (1235, 2, 0)):
        variables.update(STEP, SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step), SLURM_PROCID=str(task))
        read_place()
        ports.append(variables["MASTER_PORT"])
        for name in (*GROUP, "LOCAL_WORLD_SIZE"):
            variables.pop(name)
    assert ports[0] == ports[1] and len(set(ports)) == 3


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu-[007-008]", "gpu-007"),
        ("gpu-[3,5-9]", "gpu-3"),
        ("alpha,beta", "alpha"),
        ("rack[1-2]n[10-12]-ib,login", "rack1n10-ib"),
        ("a1,gpu-[007-008]", "a1"),
    ],
)
def test_the_first_node_of_a_list_is_that_of_rank_0(variables, nodes, first):
    variables.update(STEP, SLURM_STEP_NODELIST=nodes)
    read_place()
    assert variables["MASTER_ADDR"] == first


def test_a_step_on_one_node_meets_on_it(variables):
    variables.update(STEP, SLURM_STEP_NUM_NODES="1", SLURM_STEP_TASKS_PER_NODE="8", SLURM_NODEID="0")
    read_place()
    assert (variables["MASTER_ADDR"], variables["LOCAL_WORLD_SIZE"]) == ("127.0.0.1", "8")


@pytest.mark.parametrize(("visible", "local"), [("0", 0), ("3", 0), ("GPU-8a5e", 0), ("0,1,2,3", 1)])
def test_a_task_with_a_gpu_of_its_own_takes_the_first_that_it_sees(variables, visible, local):
    variables.update(STEP, CUDA_VISIBLE_DEVICES=visible)
    assert read_place() == (5, 8, local)


def test_what_the_script_has_exported_stays(variables):
    variables.update(STEP, MASTER_ADDR="head", MASTER_PORT="1111", WORLD_SIZE="8")
    assert read_place() == (5, 8, 1)
    assert (variables["MASTER_ADDR"], variables["MASTER_PORT"]) == ("head", "1111")


@pytest.mark.parametrize(
    "step",
    [
        # the script of sbatch, the shell of salloc: tasks were asked for, none was started
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        # srun --pty bash, and salloc's own step
        {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        # tasks that train each for themselves
        {**STEP, "WORLD_SIZE": "1"},
    ],
)
def test_no_job_of_several_ranks_is_made_where_srun_has_started_one_process(variables, step):
    variables.update(step)
    assert read_place() == (0, 1, 0)


def test_a_launcher_inside_a_step_is_heeded_and_srun_is_not(variables):
    # srun starts torchrun on each of two nodes
    variables.update(STEP, SLURM_STEP_NUM_TASKS="2", **GROUP)
    assert read_place() == (1, 2, 1)
    assert variables["MASTER_ADDR"] == "node-1"


def test_a_shell_in_a_step_of_several_tasks_is_refused_before_it_waits_for_the_others(variables, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    variables.update(STEP)
    with pytest.raises(ValueError, match="srun has started 8 tasks.*--pty.*WORLD_SIZE=1"):
        read_place()


def test_a_world_size_that_is_not_the_steps_is_refused(variables):
    variables.update(STEP, WORLD_SIZE="4")
    with pytest.raises(ValueError, match="WORLD_SIZE is '4' but srun has started 8 tasks; unset WORLD_SIZE"):
        read_place()


def test_mpirun_says_all_but_where_rank_0_is(variables):
    variables.update(MPI)
    with pytest.raises(ValueError, match="^WORLD_SIZE is 4 but MASTER_ADDR, MASTER_PORT are not set"):
        read_place()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        del variables[name]
    # under SLURM, mpirun's daemons are a step of a task on each node
    variables.update(STEP, SLURM_STEP_NUM_TASKS="2", MASTER_ADDR="node-1", MASTER_PORT="29500")
    assert read_place() == (2, 4, 0)
    assert variables["LOCAL_WORLD_SIZE"] == "2"
