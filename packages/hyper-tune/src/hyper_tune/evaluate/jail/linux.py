"""The calls of Linux that Python's standard library does not have."""

import ctypes
import os
import platform
import struct

NEW_NAMESPACES = {
    "mount": 0x0002_0000,
    "uts": 0x0400_0000,
    "ipc": 0x0800_0000,
    "pid": 0x2000_0000,
    "net": 0x4000_0000,
}
NEW_USER = 0x1000_0000

_BIND, _RECURSIVE, _PRIVATE = 0x1000, 0x4000, 0x4_0000
_NO_SETUID, _NO_DEVICES = 0x2, 0x4
_DETACH = 2
_HERE, _ALL_BELOW = -100, 0x8000
_MOUNT_SETATTR = 442
_READ_ONLY_NO_SETUID_NO_DEVICES = 0x1 | 0x2 | 0x4
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_DIE_WITH_PARENT, _NO_NEW_PRIVILEGES = 1, 38
_SIGKILL = 9
_CAPABILITIES_VERSION_3 = 0x2008_0522

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Raise the error that the last call of libc left, unless it succeeded."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def prctl(option: int, *arguments: int) -> int:
    """Call prctl with whole numbers."""
    words = [ctypes.c_ulong(word) for word in (*arguments, *[0] * (4 - len(arguments)))]
    return int(libc.prctl(ctypes.c_int(option), *words))


def unshare(flags: int) -> None:
    """Leave the namespaces of ``flags`` for new ones."""
    check(libc.unshare(ctypes.c_int(flags)), "unshare")


def map_user(user: int, group: int) -> None:
    """Be the same user and group in a new user namespace, and nobody else."""
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        descriptor = os.open(f"/proc/self/{name}", os.O_WRONLY)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)


def keep_mounts_private() -> None:
    """Let no mount of this namespace be seen in another."""
    check(libc.mount(b"none", b"/", None, ctypes.c_ulong(_RECURSIVE | _PRIVATE), None), "mount /")


def mount_memory(folder: str, options: str) -> None:
    """Mount an empty file system in memory."""
    flags = ctypes.c_ulong(_NO_SETUID | _NO_DEVICES)
    check(libc.mount(b"none", folder.encode(), b"tmpfs", flags, options.encode()), "mount tmpfs")


def mount_read_only(source: str, target: str) -> None:
    """Show a folder at another place, with all that is mounted below it, for reading only."""
    where = target.encode()
    flags = ctypes.c_ulong(_BIND | _RECURSIVE)
    check(libc.mount(source.encode(), where, None, flags, None), f"mount {source}")
    attributes = struct.pack("=QQQQ", _READ_ONLY_NO_SETUID_NO_DEVICES, 0, 0, 0)
    result = libc.syscall(
        ctypes.c_long(_MOUNT_SETATTR),
        ctypes.c_int(_HERE),
        where,
        ctypes.c_uint(_ALL_BELOW),
        attributes,
        ctypes.c_size_t(len(attributes)),
    )
    check(result, f"mount {source} read-only")


def make_root(folder: str) -> None:
    """Make a folder the root; what was outside it is gone."""
    os.chdir(folder)
    check(libc.syscall(ctypes.c_long(_PIVOT_ROOT[platform.machine()]), b".", b"."), "pivot_root")
    check(libc.umount2(b".", ctypes.c_int(_DETACH)), "umount")
    os.chdir("/")


def die_with_parent() -> None:
    """Be killed when the parent ends. A change of user undoes this."""
    check(prctl(_DIE_WITH_PARENT, _SIGKILL), "prctl")


def renounce_privileges() -> None:
    """Give up every capability, and gain none by a program that is run."""
    check(prctl(_NO_NEW_PRIVILEGES, 1), "prctl")
    header = struct.pack("=Ii", _CAPABILITIES_VERSION_3, 0)
    check(libc.capset(header, bytes(24)), "capset")
