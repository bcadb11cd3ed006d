"""Takes rights away from the process that calls it, for good: resource limits, Landlock, seccomp. Linux, standard library.

Nothing here needs privileges, and nothing differs for root. Three mechanisms, none of which can be undone:

- resource limits (setrlimit(2)), made final by dropping every capability;
- Landlock (Linux 5.13, https://docs.kernel.org/userspace-api/landlock.html) decides which files can be opened;
- a seccomp filter (https://docs.kernel.org/userspace-api/seccomp_filter.html) refuses system calls: new processes, signals
  to others, the network, and what Landlock does not cover (owners, modes and times of files).

The filter names what it refuses among the system calls up to number 423, where the tables of old end; from 424 on, where
new calls are added, it refuses all but those it names. So a kernel of tomorrow brings no new way out.

This file imports nothing of dqjax: it also runs inside the sandboxed process, before anything else.
"""

import ctypes
import errno
import os
import platform
import resource
import struct
import sys
import sysconfig

# System calls that are refused, by reason: (number on x86_64, number on aarch64); None where there is none.
_PROCESSES = {
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "ptrace": (101, 117), "kcmp": (312, 272),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
}  # fmt: skip
_NETWORK = {
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "accept": (43, 202), "accept4": (288, 242),
}  # fmt: skip
_FILES = {  # changes to files that need no open file, or that Landlock's first versions let pass
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None), "lchown": (94, None),
    "fchown": (93, 55), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None), "futimesat": (261, None),
    "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16), "truncate": (76, 45), "sync": (162, 81), "syncfs": (306, 267),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
}  # fmt: skip
_MEMORY = {  # memory that outlives the process or escapes its limit
    "memfd_create": (319, 279), "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "msgget": (68, 186),
    "msgsnd": (69, 189), "semget": (64, 190), "mq_open": (240, 180), "io_setup": (206, 0), "userfaultfd": (323, 282),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "mbind": (237, 235),
    "set_mempolicy": (238, 237), "migrate_pages": (256, 238), "move_pages": (279, 239), "remap_file_pages": (216, 234),
}  # fmt: skip
_SYSTEM = {
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "bpf": (321, 280), "perf_event_open": (298, 241), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "iopl": (172, None), "ioperm": (173, None),
    "modify_ldt": (154, None), "uselib": (134, None), "nfsservctl": (180, 42), "lookup_dcookie": (212, 18),
    "quotactl": (179, 60), "acct": (163, 89), "syslog": (103, 116), "sethostname": (170, 161), "setdomainname": (171, 162),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171),
    "vhangup": (153, 58), "personality": (135, 92),
}  # fmt: skip
REFUSED = _PROCESSES | _NETWORK | _FILES | _MEMORY | _SYSTEM

_FIRST_NEW = 424  # from here on the tables of all architectures agree
_NEW_ALLOWED = (436, 439, 441, 449, 454, 455, 456)  # close_range, faccessat2, epoll_pwait2, futex_waitv, futex_*

_CLONE, _KILL, _TGKILL, _PRLIMIT, _PRCTL, _IOCTL, _OPEN, _OPENAT = range(8)
_ARGUMENTS = {  # calls whose arguments decide
    "x86_64": {_CLONE: 56, _KILL: 62, _TGKILL: 234, _PRLIMIT: 302, _PRCTL: 157, _IOCTL: 16, _OPEN: 2, _OPENAT: 257},
    "aarch64": {_CLONE: 220, _KILL: 129, _TGKILL: 131, _PRLIMIT: 261, _PRCTL: 167, _IOCTL: 29, _OPENAT: 56},
}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_OWN_CALLS = {
    "capset": (126, 91),
    "landlock_create_ruleset": (444, 444),
    "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446),
}

_CLONE_THREAD = 0x10000
_TERMINAL_QUERIES = (
    0x5401,
    0x5413,
    0x541B,
    0x5421,
    0x5450,
    0x5451,
)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIO(N)CLEX
_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 1, 15, 38, 22

# Landlock's rights over files, bit by bit, and the version of Landlock that knows them.
_EXECUTE, _WRITE, _READ, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE = (1 << i for i in range(6))
_MAKE_REGULAR, _TRUNCATE = 1 << 8, 1 << 14
_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}


class Unconfined(OSError):
    """The kernel does not offer what confinement needs; the message says what."""


def limit(*, cpu: int, memory: int, file_size: int, open_files: int) -> None:
    """Sets limits: seconds of CPU, bytes of address space, bytes a file, open files. No core dumps."""
    for name, soft, hard in (
        (resource.RLIMIT_CPU, cpu, cpu + 1),
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_FSIZE, file_size, file_size),
        (resource.RLIMIT_NOFILE, open_files, open_files),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        ceiling = resource.getrlimit(name)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(name, (soft, hard))


def confine(*, readable: list[str], writable: list[str]) -> None:
    """From here on, this process and its threads:

    - open files only under `readable` (to read) and `writable` (folders: make, read, write and remove plain files);
    - change no other property of any file; follow paths and see that a file exists, no more;
    - make no process, run no other program, signal nobody but themselves;
    - make no socket but pairs connected to themselves;
    - hold no capabilities and cannot regain any.

    Paths that do not exist are left out.

    Raises:
      Unconfined: not Linux on x86_64 or aarch64, or the kernel lacks Landlock or seccomp. Some of the rights may be gone
        all the same: end the process.
    """
    machine = platform.machine()
    if platform.system() != "Linux" or machine not in _AUDIT_ARCH:
        raise Unconfined(f"programs are confined on Linux, x86_64 or aarch64; this is {platform.system()}, {machine}")
    libc = ctypes.CDLL(None, use_errno=True)
    column = 0 if machine == "x86_64" else 1

    def call(name: str, *arguments: int) -> int:
        result = libc.syscall(*(ctypes.c_long(a) for a in (_OWN_CALLS[name][column], *arguments)))
        if result < 0:
            raise Unconfined(f"{name}: {os.strerror(ctypes.get_errno())}")
        return result

    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise Unconfined("prctl(PR_SET_NO_NEW_PRIVS) is refused")
    _landlock(call, readable, writable)
    header, none = struct.pack("<II", 0x20080522, 0), bytes(24)  # capability sets, version 3: all empty
    call("capset", *(ctypes.cast(ctypes.c_char_p(b), ctypes.c_void_p).value for b in (header, none)))
    program = _filter(machine, os.getpid())
    buffer = ctypes.create_string_buffer(program, len(program))
    sock_fprog = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    if libc.prctl(_PR_SET_SECCOMP, 2, ctypes.c_char_p(sock_fprog), 0, 0):
        raise Unconfined(f"seccomp filter: {os.strerror(ctypes.get_errno())}")


def installation() -> list[str]:
    """What a Python program has to read: the installation and its packages, the system's libraries, harmless devices."""
    paths = sysconfig.get_paths()
    python = [paths["stdlib"], paths["platstdlib"], os.path.join(sys.base_prefix, "lib"), *packages()]
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo", "/etc/localtime"]
    devices = ["/dev/null", "/dev/zero", "/dev/urandom", "/dev/random", "/sys/devices/system/cpu"]
    return list(dict.fromkeys([*python, *system, *devices]))


def packages() -> list[str]:
    """The folders of installed packages."""
    paths = sysconfig.get_paths()
    return list(dict.fromkeys(paths[name] for name in ("purelib", "platlib")))


def die_with_parent(parent: int) -> None:
    """Kills this process when the thread that started it ends; exits at once if it already has."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _landlock(call, readable: list[str], writable: list[str]) -> None:
    try:
        version = call("landlock_create_ruleset", 0, 0, 1)
    except Unconfined as e:
        raise Unconfined(
            f"the kernel has no Landlock (Linux 5.13 or newer, `landlock` in its lsm= list): {e}"
        ) from None
    known = _RIGHTS[max(v for v in _RIGHTS if v <= version)]
    rules = {"<Q": (known,), "<QQ": (known, 0b11), "<QQQ": (known, 0b11, 0b11)}  # files; TCP; abstract sockets, signals
    form = "<Q" if version < 4 else "<QQ" if version < 6 else "<QQQ"
    attributes = struct.pack(form, *rules[form])
    address = lambda data: ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value  # noqa: E731
    ruleset = call("landlock_create_ruleset", address(attributes), len(attributes), 0)
    of_file = _READ | _WRITE | _EXECUTE | _TRUNCATE  # rights over a file itself; the others are over folders
    for paths, rights in (
        (readable, _READ | _READ_DIR),
        (writable, _READ | _READ_DIR | _WRITE | _REMOVE_FILE | _MAKE_REGULAR | _TRUNCATE),
    ):
        for path in paths:
            try:
                opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue
            mine = rights & known if os.path.isdir(path) else rights & known & of_file
            rule = struct.pack("<Qi", mine, opened)
            call("landlock_add_rule", ruleset, 1, address(rule), 0)
            os.close(opened)
    call("landlock_restrict_self", ruleset, 0)
    os.close(ruleset)


def _filter(machine: str, own: int) -> bytes:
    """The seccomp program (classic BPF, eight bytes an instruction).

    A test is a jump over the return that follows it: `if value == x: return action`.
    """
    load, equal, at_least, bits, masked, give = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
    allow, kill = 0x7FFF0000, 0x80000000
    refuse, absent, no_terminal = (0x00050000 | code for code in (errno.EPERM, errno.ENOSYS, errno.ENOTTY))
    lines: list[tuple[int, int, int, int]] = []
    emit = lambda code, k, true=0, false=0: lines.append((code, true, false, k))  # noqa: E731

    def number() -> None:
        emit(load, 0)

    def argument(i: int) -> None:
        emit(load, 16 + 8 * i)  # its lower half: pids, flags and requests are 32 bits wide

    def when(nr: int | None, body) -> None:
        """If the call is `nr`, run `body`, which ends in a return."""
        if nr is None:
            return
        number()
        here = len(lines)
        emit(equal, nr)
        body()
        lines[here] = (equal, 0, len(lines) - here - 1, nr)

    def only(i: int, values: tuple[int, ...], otherwise: int) -> None:
        argument(i)
        for value in values:
            emit(equal, value, 0, 1)
            emit(give, allow)
        emit(give, otherwise)

    emit(load, 4)
    emit(equal, _AUDIT_ARCH[machine], 1, 0)
    emit(give, kill)  # 32-bit calls have other numbers
    number()
    if machine == "x86_64":
        emit(at_least, 0x40000000, 0, 1)
        emit(give, kill)  # so has x32
    column = 0 if machine == "x86_64" else 1
    for entry in REFUSED.values():
        if entry[column] is not None:
            emit(equal, entry[column], 0, 1)
            emit(give, refuse)
    for nr in _NEW_ALLOWED:
        emit(equal, nr, 0, 1)
        emit(give, allow)
    emit(at_least, _FIRST_NEW, 0, 1)
    emit(give, absent)  # C libraries then use the older call: clone for clone3, openat for openat2

    def thread_only() -> None:
        argument(0)
        emit(bits, _CLONE_THREAD, 1, 0)
        emit(give, refuse)
        emit(give, allow)

    def no_silent_truncation(flags: int) -> None:
        """O_RDONLY with O_TRUNC empties a file without asking for the right to write."""
        argument(flags)
        emit(masked, os.O_TRUNC | os.O_ACCMODE)
        emit(equal, os.O_TRUNC | os.O_RDONLY, 0, 1)
        emit(give, refuse)
        emit(give, allow)

    calls = _ARGUMENTS[machine]
    when(calls[_CLONE], thread_only)
    when(calls[_KILL], lambda: only(0, (own,), refuse))
    when(calls[_TGKILL], lambda: only(0, (own,), refuse))
    when(calls[_PRLIMIT], lambda: only(0, (0, own), refuse))
    when(calls[_PRCTL], lambda: only(0, (_PR_SET_NAME,), refuse))
    when(calls[_IOCTL], lambda: only(1, _TERMINAL_QUERIES, no_terminal))
    when(calls.get(_OPEN), lambda: no_silent_truncation(1))
    when(calls[_OPENAT], lambda: no_silent_truncation(2))
    emit(give, allow)
    return b"".join(struct.pack("=HBBI", code, true, false, k) for code, true, false, k in lines)
