"""A process that sees no file, network or other process, and has little of everything."""

import os
import resource
import socket
import sys
from collections.abc import Mapping

from . import linux
from .seccomp import refuse_calls

_NOBODY = 65534
_MIB = 1 << 20
_SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/libx32")


def enter(folder: str, limits: Mapping[str, int], parent: int) -> None:
    """Go on, in a process of its own, as nobody in a world of an empty folder and Python's files.

    ``folder``: an empty folder to build that world on. ``limits``: ``cpu_seconds``, ``memory_mib``,
    ``files_mib``, ``open_files``. ``parent``: the process without which there is nothing to do.

    The process that calls never returns: it waits for the other and exits. The other is the first
    of its process namespace: when it ends or is killed, the kernel kills all that it may have
    started.

    Raises:
        OSError: the kernel or the machine's settings do not allow it.
    """
    user, group = _leave_namespaces()
    socket.sethostname("sandbox")
    _build_root(folder, user, group, limits["files_mib"])
    if user != os.geteuid():
        os.setgroups([])
        os.setresgid(group, group, group)
        os.setresuid(user, user, user)
    linux.die_with_parent()
    if os.getppid() != parent:
        os._exit(1)
    started, starts = os.pipe()
    child = os.fork()
    if child:
        os.close(started)
        os.write(starts, b"!")
        os.close(starts)
        _wait_and_exit(child)
    os.close(starts)
    os.setsid()
    _limit(limits)
    linux.renounce_privileges()
    linux.die_with_parent()
    # Who died before that was asked for writes nothing here.
    if os.read(started, 1) != b"!":
        os._exit(1)
    os.close(started)
    refuse_calls()
    _refuse_if_open()


def _leave_namespaces() -> tuple[int, int]:
    """Return the user and group to be."""
    others = sum(linux.NEW_NAMESPACES.values())
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        linux.unshare(others)
        return _NOBODY, _NOBODY
    linux.unshare(linux.NEW_USER | others)
    linux.map_user(user, group)
    return user, group


def _build_root(folder: str, user: int, group: int, files_mib: int) -> None:
    linux.keep_mounts_private()
    own = f"size={files_mib}m,nr_inodes=4096,mode=0755,uid={user},gid={group}"
    linux.mount_memory(folder, own)
    for path in (*_SYSTEM, *_python_folders()):
        inside = folder + path
        if os.path.islink(path) and path in _SYSTEM:
            os.symlink(os.readlink(path), inside)
        elif os.path.isdir(path) and not os.path.exists(inside):
            os.makedirs(inside)
            linux.mount_read_only(path, inside)
    linux.make_root(folder)


def _python_folders() -> list[str]:
    """Return where Python itself is installed, unless it is among the system's files."""
    folders = dict.fromkeys((sys.base_prefix, sys.base_exec_prefix))
    if any(os.path.realpath(folder) == "/" for folder in folders):
        raise OSError("Python is installed in /, which holds all files")
    return [folder for folder in folders if not f"{folder}/".startswith("/usr/")]


def _limit(limits: Mapping[str, int]) -> None:
    for kind, most in {
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_AS: limits["memory_mib"] * _MIB,
        resource.RLIMIT_FSIZE: limits["files_mib"] * _MIB,
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }.items():
        resource.setrlimit(kind, (most, most))


def _refuse_if_open() -> None:
    """Try what must not work, so that a hole is found before a stranger's code runs.

    Raises:
        OSError: something worked.
    """
    if os.getpid() != 1 or os.getppid() != 0:
        raise OSError("other processes can be seen")
    for path in ("/proc", "/sys", "/dev", "/etc", "/home", "/tmp", "/root/.bashrc"):  # noqa: S108
        if os.path.exists(path) and not _holds_python(path):
            raise OSError(f"{path} can be seen")
    for path in (*_SYSTEM, *_python_folders()):
        if os.path.isdir(path) and not os.statvfs(path).f_flag & os.ST_RDONLY:
            raise OSError(f"{path} can be written")
    for name, attempt in (
        ("start a process", os.fork),
        ("open a socket", socket.socket),
        ("leave its namespaces", lambda: linux.unshare(linux.NEW_USER)),
        ("be root", lambda: os.setuid(0)),
        ("outlive its parent", linux.die_with_parent),
    ):
        try:
            attempt()
        except OSError:
            continue
        raise OSError(f"it can {name}")


def _holds_python(path: str) -> bool:
    return any(f"{folder}/".startswith(f"{path}/") for folder in _python_folders())


def _wait_and_exit(child: int) -> None:
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
