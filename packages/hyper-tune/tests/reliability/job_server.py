"""Starts jobs by forking, from a process that has imported everything, so that each is cheap.

A script: reads one JSON request a line, and answers each by a line. ``start`` forks the processes
of a job and answers with their ids; ``wait`` answers with how each has ended, and when.
"""

import importlib
import json
import os
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import torch
from faults import install, log_samples

from hyper_tune.torchtune import cli


def child(job: dict[str, Any], rank: int, port: int) -> NoReturn:
    """Run the command of `tune run` in this process, and end it."""
    code = 1
    try:
        log = os.open(Path(job["log"]) / f"{rank}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if job["ranks"] > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"]}
            os.environ |= {name: str(value) for name, value in place.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for fault in job["faults"]:
            if fault["rank"] in (rank, "all"):
                install({**fault, "mark": f"{fault['mark']}.{rank}"})
        if job["samples"]:
            log_samples(Path(f"{job['samples']}.{rank}"))
        if job["function"] == "recipe":
            cli._PATIENCE_SECONDS = 0
            sys.argv = ["tune", *job["arguments"]]
            cli.main()
        module, _, name = job["function"].partition(":")
        getattr(importlib.import_module(module), name)(*job["arguments"])
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(job: dict[str, Any]) -> list[int]:
    """Fork the processes of a job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(job["ranks"]):
        process = os.fork()
        if process == 0:
            child(job, rank, port)
        processes.append(process)
    return processes


def wait(
    processes: list[int], ended: dict[int, tuple[int, float]], seconds: float
) -> list[tuple[int, float] | None]:
    """Wait for the processes; give exit status (negative: a signal) and time, or None, of each."""
    deadline = time.monotonic() + seconds
    while len(ended) < len(processes) and time.monotonic() < deadline:
        for process in set(processes) - ended.keys():
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                ended[process] = (os.waitstatus_to_exitcode(status), time.monotonic())
        time.sleep(0.005)
    return [ended.get(process) for process in processes]


def main() -> None:
    """Answer requests until there are no more."""
    sys.path.append(str(Path(__file__).parents[1]))  # other folders' workers, for jobs to call
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    processes: list[int] = []
    ended: dict[int, tuple[int, float]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            ended = {}
            processes = start(request["start"])
            answer: Any = processes
        else:
            answer = wait(processes, ended, request["wait"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
