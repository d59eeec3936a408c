"""An exception of one rank as the others raise it: type, message, errno and file."""

import errno
import json
import pickle

import pytest

from hrf_fast.distributed import comm
from hrf_fast.distributed.failures import pack, unpack
from hrf_fast.rewards import RewardError


def test_a_collective_where_a_rank_may_fail_alone_is_refused(monkeypatch):
    for collective in (lambda: comm.gather(1), lambda: comm.broadcast(1), lambda: comm.main_says(int)):
        with comm.agreed():
            monkeypatch.setattr(comm, "world_size", lambda: 2)
            with pytest.raises(AssertionError, match="a collective within comm.agreed"):
                collective()
            monkeypatch.undo()
    assert comm.gather(1) == [1] and comm.main_says(lambda: 2) == 2


class TwoArguments(ValueError):
    def __init__(self, option, value):
        super().__init__(f"{option} is {value}")


class Formats(Exception):
    """One argument, which is no message."""

    def __init__(self, code):
        super().__init__(f"code {code:d}")


class Answer(Exception):
    def __init__(self, response):
        super().__init__(response.status)


class NotThere(Answer, FileNotFoundError):
    """As errors of hubs are: of a library's type and of the system's."""


def carried(error, rank=1):
    return unpack(pickle.loads(pickle.dumps(pack(error))), rank)


@pytest.mark.parametrize("kind", [ValueError, RewardError, ImportError, FloatingPointError, RuntimeError])
def test_a_type_with_a_message_is_kept(kind):
    error = carried(kind("x is 3; use 4"))
    assert type(error) is kind and str(error) == "rank 1: x is 3; use 4"
    # the main rank's errors are the job's
    assert str(carried(kind("x is 3; use 4"), rank=0)) == "x is 3; use 4"


def test_an_error_of_the_system_keeps_its_number_and_file():
    error = carried(OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl"))
    assert (error.errno, error.filename) == (errno.ENOSPC, "runs/x/metrics.jsonl")
    assert str(error) == f"[Errno {errno.ENOSPC}] rank 1: No space left on device: 'runs/x/metrics.jsonl'"
    missing = carried(FileNotFoundError(errno.ENOENT, "No such file or directory", "a", None, "b"))
    assert type(missing) is FileNotFoundError and (missing.filename, missing.filename2) == ("a", "b")
    text = OSError("the disk is full")
    text.errno = errno.ENOSPC
    assert str(carried(text)) == "rank 1: the disk is full" and carried(text).errno == errno.ENOSPC


def test_a_type_that_takes_no_message_becomes_its_nearest_base_and_is_named():
    error = carried(TwoArguments("train.iterations", 3))
    assert type(error) is ValueError and str(error) == "rank 1: TwoArguments: train.iterations is 3"
    error = carried(Formats(3))
    assert type(error) is Exception and str(error) == "rank 1: Formats: code 3"
    with pytest.raises(UnicodeDecodeError) as caught:
        b"\xff".decode()
    error = carried(caught.value)
    assert type(error) is UnicodeError and str(error).startswith("rank 1: UnicodeDecodeError: 'utf-8' codec")
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads("{")
    assert str(carried(caught.value)).startswith("rank 1: JSONDecodeError: Expecting property name")


def test_a_type_of_a_library_becomes_the_systems_that_it_is_too():
    class Response:
        status = "404"

    error = carried(NotThere(Response()))
    assert type(error) is FileNotFoundError and str(error) == "rank 1: NotThere: 404"


def test_a_type_that_another_process_can_not_find_is_carried_too():
    class Local(KeyError):
        pass

    error = carried(Local("no model"))
    assert type(error) is KeyError and "rank 1: Local: 'no model'" in str(error)


def test_a_key_error_keeps_its_key():
    assert "rank 1: 'no model'" in str(carried(KeyError("no model")))
