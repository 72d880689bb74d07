"""Programs that want to pass without an answer, or to get out.

Each is small: on a machine without a sandbox it would do no lasting harm.
"""

# What the programs are asked.
SQUARES = "def check(f):\n    assert f(3) == 9\n    assert f(4) == 16\n"

# Wrong answers that claim to be right.
FORGERIES = {
    "equal to everything": """
class Anything:
    def __eq__(self, other): return True
    def __hash__(self): return 9
def f(n): return Anything()
""",
    "a number equal to everything": """
class Anything(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def f(n): return Anything(0)
""",
    "the caller's frame says passed": """
import sys
def f(n):
    frame = sys._getframe()
    while frame:
        for value in list(frame.f_locals.values()):
            if isinstance(value, list): value.append("passed")
            if isinstance(value, dict): value["passed"] = True
        frame = frame.f_back
    raise SystemExit(0)
""",
    "check is replaced in every name space": """
import gc
def f(n):
    for thing in gc.get_objects():
        if isinstance(thing, dict) and "check" in thing: thing["check"] = lambda f: None
    for thing in gc.get_objects():
        if getattr(thing, "__name__", "") == "check": thing.__code__ = (lambda f: None).__code__
    raise SystemExit(0)
""",
    "exit with success": "import sys\ndef f(n): sys.exit(0)",
    "exit with success when imported": "import os\nos._exit(0)",
    "exit without cleaning up": "import os\ndef f(n): os._exit(0)",
    "passed written to every descriptor": """
import os
for descriptor in range(64):
    for text in (b"passed\\n", b'{"passed": true}\\n', b'={"passed": true}\\n'):
        try: os.write(descriptor, text)
        except OSError: pass
def f(n): os._exit(0)
""",
    "assertions do nothing": """
import builtins
class Harmless(BaseException): pass
builtins.AssertionError = Harmless
builtins.Exception = Harmless
def f(n): return 0
""",
    "statements are skipped by tracing": """
import sys
def trace(frame, event, argument):
    frame.f_trace_lines = False
    return trace
sys.settrace(trace)
def f(n): return 0
""",
    "the sender is replaced": """
import sys
for module in list(sys.modules.values()):
    for name in ("encode", "decode", "_value", "_said", "run_tests", "check"):
        if hasattr(module, name): setattr(module, name, lambda *a: "true")
def f(n): return 0
""",
    "answers before it is asked": """
import os
for descriptor in range(64):
    try: os.write(descriptor, b"=true\\n=true\\n=true\\n")
    except OSError: pass
def f(n): return True
""",
    "not a number": "def f(n): return float('nan')",
    "an answer that never ends": "def f(n): return 'a' * (1 << 24)",
    "an answer without a bottom": "def f(n):\n    a = []\n    a.append(a)\n    return a",
    "an answer deeper than the stack": """
def f(n):
    import sys
    for module in list(sys.modules.values()):
        if hasattr(module, "encode"): module.encode = lambda value: "[" * 100000
    return 0
""",
    "an exception that lies": """
class Lie(BaseException):
    def __str__(self): return "=16"
    def __class__(self): raise self
def f(n): raise Lie
""",
}

# What is tried, and what it must come to: the tests want f() to return that word.
ATTEMPTS = {
    "fork bomb": (
        "import os, time\n"
        "def attempt():\n  for _ in range(20):\n    if os.fork() == 0: time.sleep(1)",
        "PermissionError",
    ),
    "grandchild that outlives its parents": (
        "import os, time\ndef attempt():\n  if os.fork() == 0:\n    os.setsid()\n    time.sleep(3)",
        "PermissionError",
    ),
    "thread": (
        "import threading\ndef attempt(): threading.Thread(target=print).start()",
        "RuntimeError",
    ),
    "another program": (
        "import subprocess\ndef attempt(): subprocess.run(['/usr/bin/env'])",
        "PermissionError",
    ),
    "a program in its own place": (
        "import os\ndef attempt(): os.execv('/usr/bin/env', ['env'])",
        "PermissionError",
    ),
    "memory": ("def attempt(): return len(bytearray(1 << 29))", "MemoryError"),
    "a large file": (
        "def attempt():\n"
        "  with open('f', 'wb') as f:\n    for _ in range(32): f.write(bytes(1 << 20))",
        "OSError",
    ),
    "many files": (
        "def attempt():\n"
        "  for i in range(8):\n    with open(str(i), 'wb') as f: f.write(bytes(3 << 20))",
        "OSError",
    ),
    "ten thousand files": (
        "def attempt():\n  for i in range(10000): open(str(i), 'w').close()",
        "OSError",
    ),
    "descriptors": ("def attempt(): return [open('f', 'w') for _ in range(100)]", "OSError"),
    "the passwords": ("def attempt(): return open('/etc/passwd').read()", "FileNotFoundError"),
    "the tests on disk": ("def attempt(): return open({tests!r}).read()", "FileNotFoundError"),
    "other processes' memory": (
        "def attempt(): return open('/proc/1/mem').read()",
        "FileNotFoundError",
    ),
    "Python's own files": (
        "import json\ndef attempt(): open(json.__file__, 'a').write('pass')",
        "OSError",
    ),
    "a secret of the environment": (
        "import os\ndef attempt(): return os.environ['HYPER_TUNE_SECRET']",
        "KeyError",
    ),
    "the network": (
        "import socket\ndef attempt(): socket.create_connection(('127.0.0.1', {port}), 2)",
        "PermissionError",
    ),
    "a local socket": (
        "import socket\ndef attempt(): return socket.socketpair()",
        "PermissionError",
    ),
    "killing the parent": (
        "import os, signal\ndef attempt(): os.kill({parent}, signal.SIGKILL)",
        "ProcessLookupError",
    ),
    "killing the group": (
        # The first process of a namespace does not hear itself; nobody else is in its group.
        "import os, signal, time\n"
        "def attempt():\n  os.killpg(0, signal.SIGKILL)\n  time.sleep(0.5)\n  raise KeyError",
        "KeyError",
    ),
    "the machine's name": (
        "import os\ndef attempt():\n  if os.uname().nodename == 'sandbox': raise KeyError",
        "KeyError",
    ),
    "being root": ("import os\ndef attempt(): os.setuid(0)", "OSError"),
    "more of what is limited": (
        "import resource as r\ndef attempt(): r.setrlimit(r.RLIMIT_CPU, (99, 99))",
        "ValueError",
    ),
}

# Calls of the system by ctypes that must fail with EPERM.
CALLS = {
    "shared memory that nobody counts": "libc.shmget(0, 1 << 20, 0o1600)",
    "a file in memory": "libc.memfd_create(b'f', 0)",
    "a new user namespace": "libc.unshare(0x10000000)",
    "a file system": "libc.mount(b'none', b'/', b'tmpfs', 0, None)",
    "another root": "libc.chroot(b'/usr')",
    "tracing": "libc.ptrace(0, 0, 0, 0)",
    "not to end with its parent": "libc.prctl(1, 0, 0, 0, 0)",
    "the kernel's messages": "libc.klogctl(3, ctypes.create_string_buffer(64), 64)",
    "watches of files": "libc.inotify_init1(0)",
    "memory of the kernel's for later reads": (
        "libc.syscall({'x86_64': 206, 'aarch64': 0}[os.uname().machine], 1,"
        " ctypes.byref(ctypes.c_ulong()))"
    ),
}

# What would go on for ever; the last is for what the limit of time is told by.
ENDLESS = {
    "a loop": ("def f(n):\n    while True: pass", "SIGKILL"),
    "a loop that hears no signal": (
        "import signal\n"
        "for number in (signal.SIGALRM, signal.SIGXCPU, signal.SIGTERM, signal.SIGINT):\n"
        "    signal.signal(number, signal.SIG_IGN)\n"
        "def f(n):\n"
        "    while True:\n"
        "        try:\n"
        "            while True: pass\n"
        "        except BaseException: pass",
        "SIGKILL",
    ),
    "a loop when imported": ("while True: pass", "SIGKILL"),
    "sleep": ("import time\ndef f(n): time.sleep(1000)", "seconds"),
    "a stopped process": (
        "import os, time\ndef f(n):\n    os.kill(os.getpid(), 19)\n    time.sleep(1000)",
        "seconds",
    ),
    "sleep that does not end with its parent": (
        "import ctypes, time\n"
        "def f(n):\n    ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\n    time.sleep(1000)",
        "seconds",
    ),
    "output": ("def f(n):\n    while True: print('a' * 65536)", "SIGKILL"),
    "a crash": ("import ctypes\ndef f(n): ctypes.string_at(0)", "SIGSEGV"),
}


def outcome(attempt: str) -> str:
    """A program whose f says by which exception an attempt failed, or what it brought."""
    return (
        f"{attempt}\n"
        "def f():\n"
        "    try: return f'it worked: {str(attempt())[:50]}'\n"
        "    except BaseException as error: return [k.__name__ for k in type(error).__mro__]\n"
    )
