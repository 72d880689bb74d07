"""A filter of system calls: no process, program, socket or memory outside the limits, and no end
that a process could put off.
"""

import ctypes
import errno
import platform
import struct

from .linux import check, prctl

_SET_SECCOMP, _FILTER_MODE = 22, 2
_KILL, _ERRNO, _ALLOW = 0x8000_0000, 0x0005_0000, 0x7FFF_0000
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_X32 = 0x4000_0000
_PRCTL = {"x86_64": 157, "aarch64": 167}
_DEATH_SIGNAL = 1  # the first argument of the prctl that says what a parent's end does

# Since 5.1 a call has one number on every machine. In order: io_uring_setup, open_tree, move_mount,
# fsopen, fsconfig, fsmount, fspick, pidfd_open, clone3, mount_setattr, landlock's three,
# memfd_secret.
_EVERYWHERE = (425, 428, 429, 430, 431, 432, 433, 434, 435, 442, 444, 445, 446, 447)
# Of each machine its mark in a filter and the numbers of its calls that are refused.
_CALLS: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (
        0xC000_003E,
        {
            **{"fork": 57, "vfork": 58, "clone": 56, "execve": 59, "execveat": 322},
            **{"socket": 41, "socketpair": 53, "ptrace": 101},
            **{"shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240, "memfd_create": 319},
            **{"process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312},
            **{"mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161},
            **{"unshare": 272, "setns": 308, "personality": 135, "acct": 163, "quotactl": 179},
            **{"add_key": 248, "request_key": 249, "keyctl": 250},
            **{"perf_event_open": 298, "bpf": 321, "userfaultfd": 323},
            **{"name_to_handle_at": 303, "open_by_handle_at": 304},
            **{"init_module": 175, "finit_module": 313, "kexec_load": 246, "reboot": 169},
            **{"syslog": 103, "io_setup": 206, "fanotify_init": 300},
            **{"inotify_init": 253, "inotify_init1": 294},
        },
    ),
    "aarch64": (
        0xC000_00B7,
        {
            **{"clone": 220, "execve": 221, "execveat": 281},
            **{"socket": 198, "socketpair": 199, "ptrace": 117},
            **{"shmget": 194, "semget": 190, "msgget": 186, "mq_open": 180, "memfd_create": 279},
            **{"process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272},
            **{"mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51},
            **{"unshare": 97, "setns": 268, "personality": 92, "acct": 89, "quotactl": 60},
            **{"add_key": 217, "request_key": 218, "keyctl": 219},
            **{"perf_event_open": 241, "bpf": 280, "userfaultfd": 282},
            **{"name_to_handle_at": 264, "open_by_handle_at": 265},
            **{"init_module": 105, "finit_module": 273, "kexec_load": 104, "reboot": 142},
            **{"syslog": 116, "io_setup": 0, "fanotify_init": 262, "inotify_init1": 26},
        },
    ),
}


def refuse_calls() -> None:
    """Make the refused calls fail with EPERM, in this process, for good.

    Raises:
        OSError: the kernel has no such filters, or the machine is not one of those known.
    """
    machine = platform.machine()
    if machine not in _CALLS:
        raise OSError(errno.ENOSYS, f"calls of {machine} are not known; {', '.join(_CALLS)} are")
    mark, calls = _CALLS[machine]
    program = _program(mark, sorted({*calls.values(), *_EVERYWHERE}), _PRCTL[machine])
    code = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))

    pointer = Program(len(program) // 8, ctypes.addressof(code))
    check(prctl(_SET_SECCOMP, _FILTER_MODE, ctypes.addressof(pointer)), "seccomp")


def _program(mark: int, refused: list[int], prctl_number: int) -> bytes:
    """Return the filter: another machine's calls kill, those of ``refused`` fail, others pass.

    A process may not change what the end of its parent does to it, or it would live on.
    """
    lines = [
        (_LOAD, 0, 0, 4),  # the machine
        (_EQUAL, 1, 0, mark),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # the number of the call
        (_AT_LEAST, 0, 1, _X32),  # x86_64 has a second numbering up there
        (_RETURN, 0, 0, _KILL),
    ]
    end = [
        (_EQUAL, 0, 2, prctl_number),
        (_LOAD, 0, 0, 16),  # the low half of the first argument
        (_EQUAL, 1, 0, _DEATH_SIGNAL),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
    ]
    last = len(refused) + len(end) - 2
    lines += [(_EQUAL, last - place, 0, number) for place, number in enumerate(refused)]
    return b"".join(struct.pack("=HBBI", *line) for line in [*lines, *end])
