"""What a process says when a collective cannot end; what it is told by SIGTERM."""

import os
import signal
import subprocess
import sys
import threading
import zlib
from socket import gethostname

import pytest
import torch
import torch.distributed as dist

from hyper_tune import MethodConfig, assemble, peers
from hyper_tune.errors import UserError
from hyper_tune.peers import Peers
from hyper_tune.stop_request import StopRequest

HERE = zlib.crc32(gethostname().encode())
CLOSED = RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:52")
START = "after step 5 of 12: the other processes do not answer: "
END = ". What was saved stays; start the job again with resume_from_checkpoint=True."


def test_the_processes_of_this_machine_are_named() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        places = ((HERE, os.getpid()), (HERE, other.pid), (HERE ^ 1, other.pid))
        other.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, other.pid, os.WSTOPPED)
        said = Peers(places).explain(CLOSED, "after step 5 of 12")
        assert str(said) == f"{START}rank 1 (process {other.pid}) is stopped{END}"
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # It is a zombie now.
        said = Peers(places).explain(CLOSED, "after step 5 of 12")
        assert str(said) == f"{START}rank 1 (process {other.pid}) has ended{END}"
    said = Peers(places).explain(CLOSED, "after step 5 of 12")
    assert str(said) == f"{START}rank 1 (process {other.pid}) has ended{END}"


def test_where_all_are_well_it_says_so() -> None:
    said = Peers(((HERE, os.getpid()), (HERE ^ 1, 1))).explain(CLOSED, "after step 5 of 12")
    nobody = "none on this machine has ended or is stopped, so one hangs, or is on another machine"
    assert str(said) == f"{START}{nobody}{END}"


@pytest.mark.parametrize(
    "error", [RuntimeError("shape mismatch"), ValueError("gloo"), KeyboardInterrupt()]
)
def test_other_errors_are_left_alone(error: BaseException) -> None:
    assert Peers(((HERE, os.getpid()),)).explain(error, "at the start") is None


def test_errors_of_the_rendezvous_are_of_a_collective() -> None:
    error = dist.DistNetworkError("The client socket has timed out")
    assert str(Peers().explain(error, "at the start")).startswith("at the start: the other proc")


def test_a_store_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()

    def hang() -> None:
        assert answered.wait(60)
        raise RuntimeError("nobody is there")

    monkeypatch.setattr(peers, "_get_default_store", hang)
    some = Peers(((HERE, os.getpid()), (HERE ^ 1, 1)))
    some.tell(UserError("no row"))
    assert str(some.explain(CLOSED, "after step 5 of 12")).startswith(START)
    answered.set()


def test_an_error_of_an_earlier_run_is_forgotten() -> None:
    """A job may make several runs, one after the other; the launcher's store outlives them."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        first = Peers.meet(torch.device("cpu"))
        first.tell(UserError("no row"))
        assert str(first.explain(CLOSED, "after step 5 of 12")) == "no row"
        second = Peers.meet(torch.device("cpu"))
        assert str(second.explain(CLOSED, "after step 5 of 12")).startswith(START)
    finally:
        dist.destroy_process_group()


def test_without_a_group_there_are_no_peers() -> None:
    assert Peers.meet(torch.device("cpu")) == Peers()


def test_the_handler_is_put_back_and_is_of_the_main_thread() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert signal.getsignal(signal.SIGTERM) == stop._note
    assert signal.getsignal(signal.SIGTERM) == before

    def elsewhere() -> None:
        with StopRequest() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    seen: list[object] = []
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


@pytest.mark.parametrize("asked", [False, True])
def test_a_step_reports_the_request_and_is_the_same_step(asked: bool) -> None:
    found = []
    for answer in (asked, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        method = assemble(model, MethodConfig("lora", init_rank=2), total_steps=3)
        optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
        with method.step(optimizer, None, lambda a=answer: a) as step:
            step.backward(model(torch.ones(3, 8)).square().sum(), tokens=3)
        found.append((step.report.loss, step.report.tokens, method.stack.values.clone()))
        assert step.report.stop_requested is answer
    assert found[0][:2] == found[1][:2]
    assert torch.equal(found[0][2], found[1][2])
