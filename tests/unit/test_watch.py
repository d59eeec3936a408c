"""The watch of a job's ranks, in processes that do nothing else: who is found dead, and who is not."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hrf_fast.distributed.watch import Watch, keep_alive

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
# a rank that connects, says so, does something and leaves when its input ends; ranks share by a file
RANK = """
import ctypes, json, os, sys, time
from pathlib import Path
from hrf_fast.distributed.watch import Watch

rank, ranks, file, doing = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]

def share(value):
    if rank == 0:
        file.with_suffix(".tmp").write_text(json.dumps(value))
        file.with_suffix(".tmp").rename(file)
    while not file.exists():
        time.sleep(0.01)
    return json.loads(file.read_text())

watch = Watch(rank, ranks, share, lost_after=10.0)
if doing == "fork" and os.fork() == 0:
    os.closerange(0, 3)
    time.sleep(5)
    os._exit(0)
print("ready", flush=True)
sys.stdin.readline()
if doing == "lock":
    # native code that keeps Python's lock
    ctypes.PyDLL(None).sleep(2)
if doing == "fail":
    watch.leave(failed=True)
    sys.exit(3)
sys.stdin.readline()
watch.leave(failed=False)
"""


@pytest.fixture
def job(tmp_path):
    """Start ranks that do something; all are connected when it returns."""
    processes = []

    def start(*doings):
        for rank, doing in enumerate(doings):
            command = [sys.executable, "-c", RANK, str(rank), str(len(doings)), str(tmp_path / "shared"), doing]
            pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            processes.append(subprocess.Popen(command, cwd=ROOT, text=True, bufsize=1, **pipes))
        for process in processes:
            assert process.stdout.readline() == "ready\n", process.communicate()[1]
        return processes

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def say(processes, text="\n"):
    for process in processes:
        process.stdin.write(text)
        process.stdin.flush()


def ends(process, within):
    """(exit code, standard error) of a process that must end in so many seconds."""
    code = process.wait(timeout=within)
    return code, process.stderr.read()


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_is_killed_is_named_at_once_by_all_others(job, victim):
    processes = job("wait", "wait", "wait")
    processes[victim].kill()
    for rank in {0, 1, 2} - {victim}:
        code, errors = ends(processes[rank], within=5)
        assert code == 1
        name = f"rank {victim} (process {processes[victim].pid} on {socket.gethostname()})"
        assert errors.startswith(f"error: {name} has died, so rank {rank} stops too")


def test_ranks_that_hold_pythons_lock_or_are_stopped_are_alive(job):
    processes = job("lock", "lock", "wait")
    processes[2].send_signal(signal.SIGSTOP)
    say(processes)
    time.sleep(2.5)
    assert [process.poll() for process in processes] == [None, None, None]
    processes[2].send_signal(signal.SIGCONT)
    say(processes)
    assert [ends(process, within=5) for process in processes] == [(0, "")] * 3


def test_a_death_is_found_although_a_child_of_the_rank_lives_on(job):
    processes = job("wait", "fork")
    processes[1].kill()
    code, errors = ends(processes[0], within=4)
    assert code == 1 and "rank 1 " in errors and "has died" in errors


@pytest.mark.parametrize("doings", [("fail", "wait", "wait"), ("wait", "wait", "fail")])
def test_a_rank_that_fails_ends_the_others_without_being_called_dead(job, doings):
    processes = job(*doings)
    say(processes)
    for rank, process in enumerate(processes):
        code, errors = ends(process, within=5)
        if doings[rank] == "fail":
            assert (code, errors) == (3, "")
        else:
            assert code == 1 and f"rank {doings.index('fail')} " in errors and "has stopped with an error" in errors


def test_a_stranger_at_the_port_is_no_rank(tmp_path):
    """Rank 0 waits for rank 1 and gets a stranger first."""
    heard = []

    def share(value):
        _, port, token, _ = value
        for line in ("GET / HTTP/1.1\n", f"{token} rank 1 (process 5 on there)\n"):
            heard.append(socket.create_connection(("127.0.0.1", port)))
            heard[-1].sendall(line.encode())
        return value

    watch = Watch(0, 2, share, lost_after=10.0)
    assert list(watch._peers.values()) == ["rank 1 (process 5 on there)"]
    assert heard[0].recv(10) == b""
    heard[1].sendall(b"L")
    watch.leave(failed=False)
    assert heard[1].recv(100).endswith(b"\nL")
    for connection in heard:
        connection.close()


def test_a_machine_is_given_up_after_the_limit_and_by_the_systems_probes():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as connection:
        keep_alive(connection, 600.0)
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        idle, interval, count = (
            connection.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_KEEP{name}"))
            for name in ("IDLE", "INTVL", "CNT")
        )
        # 300 seconds of silence, then five probes, a minute apart
        assert (idle, interval, count) == (300, 60, 5) and idle + interval * count == 600


def test_a_connection_that_times_out_says_that_the_machine_does_not_answer():
    class Silent:
        def recv(self, _):
            raise TimeoutError(110, "Connection timed out")

    watch = Watch.__new__(Watch)
    watch._peers = {Silent(): "rank 3 (process 7 on node-2)"}
    (connection,) = watch._peers
    assert watch._hear(connection) == "rank 3 (process 7 on node-2) does not answer any more (Connection timed out)"


def test_a_rank_that_reaches_nobody_says_where_it_looked(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ConnectionError, match=f"rank 1 can't reach rank 0 at port {port} .*127.0.0.1: .*MASTER_ADDR"):
        Watch(1, 2, lambda _: [["127.0.0.1"], port, "token", "rank 0"], lost_after=10.0)
