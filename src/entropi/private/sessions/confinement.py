"""What a party's process gives up before the first byte of the other side reaches it.

Its engine is native code that reads what the other side has computed. Whoever takes it over gets what is in this one
process; `confine` sees to it that there is nothing more to get: no network, no files but Python's, no other programs,
no further rights, no memory image on disk. The kernel enforces this, as far as it can; what it cannot is named.

We call the kernel directly: of the libraries for Landlock and seccomp on PyPI that we looked at, `landlock` 1.0.0.dev5
and `py-landlock` 0.1.1 are beginnings, and `pyseccomp` 0.1.2 is of 2021 and needs a C library too.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import stat
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

# <linux/prctl.h>
_SET_DUMPABLE, _SET_SECCOMP, _SET_NO_NEW_PRIVS = 4, 22, 38
# System calls for Landlock have the same numbers on all architectures.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
# <linux/landlock.h>: rights to files by the version that knows them; of networks, binding and connecting by TCP; what
# is scoped is abstract Unix sockets and signals.
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_WRITE_FILE, _READ_FILE, _READ_FOLDER = 1 << 1, 1 << 2, 1 << 3
_OWN_FOLDER = 0b100_0011_1011_1110  # these; to make files, folders and sockets, to shorten and to remove them
_TCP, _SCOPES = 3, 3
# Beyond what one process needs that computes and speaks over Unix sockets: other programs and their memory, the
# kernel's own machinery, keys, namespaces, and other ways to files and networks. Numbers of x86-64.
_FORBIDDEN = {
    "execve": 59, "execveat": 322, "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312,
    "pidfd_open": 434, "pidfd_getfd": 438, "pidfd_send_signal": 424, "bpf": 321, "perf_event_open": 298,
    "userfaultfd": 323, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "add_key": 248,
    "request_key": 249, "keyctl": 250, "unshare": 272, "setns": 308, "mount": 165, "umount2": 166, "pivot_root": 155,
    "chroot": 161, "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsmount": 432, "mount_setattr": 442,
    "open_by_handle_at": 304, "name_to_handle_at": 303, "init_module": 175, "finit_module": 313, "delete_module": 176,
    "kexec_load": 246, "kexec_file_load": 320, "reboot": 169, "swapon": 167, "swapoff": 168, "acct": 163,
    "settimeofday": 164, "clock_settime": 227, "adjtimex": 159, "clock_adjtime": 305, "iopl": 172, "ioperm": 173,
    "personality": 135, "quotactl": 179, "syslog": 103, "sethostname": 170, "setdomainname": 171, "mknod": 133,
    "mknodat": 259, "vhangup": 153, "fork": 57, "vfork": 58,
}  # fmt: skip
_SOCKET, _SOCKET_PAIR, _CLONE, _CLONE3 = 41, 53, 56, 435
_CLONE_THREAD = 0x10000
_AUDIT_ARCH_X86_64 = 0xC000003E
_STRANGERS = 0x60000000  # user ids from here on belong to nobody; a process adds its own id
_NOBODY = 65534

_libc = ctypes.CDLL(None, use_errno=True)


def confine(folder: Path) -> list[str]:
    """Give up everything that this process does not need to compute and to speak over sockets in `folder`.

    To be called while there is one thread: some of it holds for the calling one and those that it starts.

    Returns:
        What is in force now, and after "not: " what this system does not offer; in words.
    """
    given_up = [_no_memory_image()]
    given_up += [_another_user(folder)] if os.geteuid() == 0 else []
    _libc.prctl(_SET_DUMPABLE, 0, 0, 0, 0)  # again: changing the user undoes it on some systems
    given_up.append("no new rights" if _libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 else "not: no new rights")
    return [*given_up, _landlock(folder), _seccomp()]


def summary(given_up: Iterable[str]) -> str:
    """One line of what `confine` returned."""
    told = list(given_up)
    held = ", ".join(line for line in told if not line.startswith("not: "))
    missing = ", ".join(line.removeprefix("not: ") for line in told if line.startswith("not: "))
    return held + (f"; not in force: {missing}" if missing else "")


def _no_memory_image() -> str:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _libc.prctl(_SET_DUMPABLE, 0, 0, 0, 0)
    return "no core dumps"


def _another_user(folder: Path) -> str:
    """Become a user whom nobody else is, if that one can read Python's files."""
    closed = next((path for path in _python() if not _open_to_all(path)), None)
    if closed is not None:
        return f"not: a user of its own (only some may read {closed})"
    if not all(above.stat().st_mode & stat.S_IXOTH for above in folder.resolve().parents):
        return f"not: a user of its own (only some may enter {folder.parent})"
    for user in (_STRANGERS + os.getpid(), _NOBODY):
        try:
            os.chown(folder, user, user)
            for path in folder.iterdir():
                os.chown(path, user, user)
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        except OSError:
            continue
        return "a user of its own"
    return "not: a user of its own (the system has no such ids)"


def _open_to_all(path: Path) -> bool:
    """Whether any user may read a folder, as far as its own mode and those above tell."""
    need = [(path, stat.S_IROTH | stat.S_IXOTH)] + [(above, stat.S_IXOTH) for above in path.parents]
    return all(each.stat().st_mode & bits == bits for each, bits in need)


def _python() -> list[Path]:
    """Folders from which modules and libraries are still loaded while the computation runs.

    Of the search path none that holds the working folder, where keys and models may lie; the package itself by name.
    """
    here = Path.cwd()
    installed = [sys.prefix, sys.base_prefix, str(Path(__file__).parents[2])]
    searched = [path for path in filter(None, sys.path) if not here.is_relative_to(Path(path).resolve())]
    return sorted({Path(name).resolve() for name in [*installed, *searched] if Path(name).is_dir()})


def _landlock(folder: Path) -> str:
    version = _libc.syscall(_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return "not: Landlock (files, TCP)"
    rights = max(value for since, value in _FILE_RIGHTS.items() if since <= version)
    tcp, scopes = (_TCP if version >= 4 else 0), (_SCOPES if version >= 6 else 0)
    attributes = struct.pack("=QQQ", rights, tcp, scopes)[: 24 if scopes else 16 if tcp else 8]
    rules = _libc.syscall(_CREATE_RULESET, attributes, len(attributes), 0)
    if rules < 0:
        return f"not: Landlock ({os.strerror(ctypes.get_errno())})"
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/sys/devices/system/cpu"]
    readable = [*_python(), *map(Path, [*system, "/proc/self", f"/proc/{os.getpid()}"])]
    files = ["/dev/urandom", "/dev/random", "/etc/ld.so.cache", "/etc/localtime", "/proc/cpuinfo", "/proc/meminfo"]
    try:
        for path in readable:
            _allow(rules, path, _READ_FILE | _READ_FOLDER)
        for path in map(Path, [*files, "/proc/stat", "/proc/loadavg", "/proc/version"]):
            _allow(rules, path, _READ_FILE)
        _allow(rules, Path("/dev/null"), _READ_FILE | _WRITE_FILE)
        _allow(rules, folder, _OWN_FOLDER & rights)
        if _libc.syscall(_RESTRICT_SELF, rules, 0) != 0:
            return f"not: Landlock ({os.strerror(ctypes.get_errno())})"
    finally:
        os.close(rules)
    parts = ["no files but Python's"] + ["no TCP"] * bool(tcp) + ["no signals to others"] * bool(scopes)
    return f"{', '.join(parts)} (Landlock {version})"


def _allow(rules: int, path: Path, rights: int) -> None:
    with contextlib.suppress(FileNotFoundError, PermissionError):  # what is not there need not be readable
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            rule = struct.pack("=Qi", rights, descriptor)
            if _libc.syscall(_ADD_RULE, rules, 1, rule, 0) != 0:
                raise OSError(ctypes.get_errno(), f"{path} cannot be allowed to a party")
        finally:
            os.close(descriptor)


def _seccomp() -> str:
    """A filter of system calls, for the whole process and what it may start."""
    if platform.machine() != "x86_64":
        return f"not: seccomp (its numbers are not known here for {platform.machine()})"
    program = _filter()
    length = len(program) // 8
    code = ctypes.create_string_buffer(program)
    filters = struct.pack("@HP", length, ctypes.addressof(code))
    if _libc.prctl(_SET_SECCOMP, 2, ctypes.c_char_p(filters), 0, 0) != 0:
        return f"not: seccomp ({os.strerror(ctypes.get_errno())})"
    return "no sockets but Unix ones, no other programs (seccomp)"


def _filter() -> bytes:
    """Classic BPF over (call's number, architecture, address, six arguments of 64 bits)."""
    load, equal, any_bit, end = 0x20, 0x15, 0x45, 0x06
    kill, refuse, missing, allow = 0x80000000, 0x00050001, 0x00050026, 0x7FFF0000  # EPERM, ENOSYS
    steps: list[tuple[int, int, int, int]] = [
        (load, 0, 0, 4),
        (equal, 1, 0, _AUDIT_ARCH_X86_64),
        (end, 0, 0, kill),  # another architecture's numbers mean other calls
        (load, 0, 0, 0),
        (any_bit, 0, 1, 0x40000000),  # and so do those of x32
        (end, 0, 0, kill),
    ]
    for number in sorted(_FORBIDDEN.values()):
        steps += [(equal, 0, 1, number), (end, 0, 0, refuse)]
    for number in (_SOCKET, _SOCKET_PAIR):
        # Where the number is this one: the low half of the first argument must be AF_UNIX.
        steps += [(equal, 0, 4, number), (load, 0, 0, 16), (equal, 1, 0, 1), (end, 0, 0, refuse), (end, 0, 0, allow)]
    # A new thread, but no new process; of `clone3` a filter cannot see the flags, and without it `clone` is taken.
    steps += [(equal, 0, 1, _CLONE3), (end, 0, 0, missing)]
    steps += [(equal, 0, 4, _CLONE), (load, 0, 0, 16), (any_bit, 1, 0, _CLONE_THREAD), (end, 0, 0, refuse)]
    steps += [(end, 0, 0, allow), (end, 0, 0, allow)]
    return b"".join(struct.pack("=HBBI", code, yes, no, value) for code, yes, no, value in steps)
