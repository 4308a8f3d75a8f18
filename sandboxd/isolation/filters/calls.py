"""What a sandboxed program may ask of the kernel. The one place to read, or to change.

Names are libseccomp's. Whatever is not listed is refused with EPERM; numbers above ``LAST`` with
ENOSYS, so that a program on a newer kernel falls back as it would on an older one.

Left out on purpose: what loads code into the kernel or programs it (bpf, kexec, modules,
io_uring, perf_event_open, userfaultfd, fanotify), what reaches into another process (ptrace,
process_vm_*, process_madvise, pidfd_getfd, kcmp), namespaces and mounts, the kernel's keyrings
(one per user, not per namespace), file handles (they pass by the mount tree), the host's clock,
name, swap, quota, log and NUMA placement, memory that hides from its owner (memfd_secret), and
what only old programs knew (uselib, ustat, sysfs, modify_ldt, vm86, remap_file_pages).
"""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass

__all__ = ["ALLOWED", "ALLOWED_IF", "BUILDING", "FREQUENT", "LAST", "REFUSED_IF", "Test"]

#: The last system call that this list knows (futex_requeue, Linux 6.7). Since 5.1 new ones have
#: the same number on every architecture.
LAST = 456

_FILES = """
access chdir chmod chown chown32 close close_range copy_file_range creat dup dup2 dup3 faccessat
faccessat2 fadvise64 fadvise64_64 arm_fadvise64_64 fallocate fchdir fchmod fchmodat fchmodat2
fchown fchown32 fchownat fcntl fcntl64 fdatasync fgetxattr flistxattr flock fremovexattr fsetxattr
fstat fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate ftruncate64 futimesat getcwd getdents
getdents64 getxattr inotify_add_watch inotify_init inotify_init1 inotify_rm_watch ioctl lchown
lchown32 lgetxattr link linkat listxattr llistxattr _llseek lremovexattr lseek lsetxattr lstat
lstat64 mkdir mkdirat mknod mknodat newfstatat oldfstat oldlstat oldstat open openat openat2 pread64
preadv preadv2 pwrite64 pwritev pwritev2 read readahead readdir readlink readlinkat readv
removexattr rename renameat renameat2 rmdir sendfile sendfile64 setxattr splice stat stat64 statfs
statfs64 statx symlink symlinkat sync sync_file_range arm_sync_file_range syncfs tee truncate
truncate64 umask unlink unlinkat utime utimensat utimensat_time64 utimes vmsplice write writev
cachestat
"""
_WAITING = """
_newselect epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait
epoll_wait_old eventfd eventfd2 io_cancel io_destroy io_getevents io_pgetevents
io_pgetevents_time64 io_setup io_submit pipe pipe2 poll ppoll ppoll_time64 pselect6
pselect6_time64 select signalfd signalfd4 timerfd_create timerfd_gettime timerfd_gettime64
timerfd_settime timerfd_settime64
"""
_NETWORK = """
accept accept4 bind connect getpeername getsockname getsockopt listen recv recvfrom recvmmsg
recvmmsg_time64 recvmsg send sendmmsg sendmsg sendto setsockopt shutdown socketcall
"""
_MEMORY = """
brk madvise map_shadow_stack membarrier memfd_create mincore mlock mlock2 mlockall mmap mmap2
mprotect mremap msync munlock munlockall munmap pkey_alloc pkey_free pkey_mprotect
"""
_PROCESSES = """
arch_prctl capget capset execve execveat exit exit_group fork get_robust_list get_thread_area
getcpu getegid getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32 getpgid getpgrp
getpid getppid getpriority getresgid getresgid32 getresuid getresuid32 getrlimit getrusage getsid
gettid getuid getuid32 ioprio_get ioprio_set landlock_add_rule landlock_create_ruleset
landlock_restrict_self nice pidfd_open pidfd_send_signal prctl prlimit64 restart_syscall
rseq sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam
sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity
sched_setattr sched_setparam sched_setscheduler sched_yield seccomp set_robust_list
set_thread_area set_tid_address setfsgid setfsgid32 setfsuid setfsuid32 setgid setgid32 setgroups
setgroups32 setpgid setpriority setregid setregid32 setresgid setresgid32 setresuid setresuid32
setreuid setreuid32 setrlimit setsid setuid setuid32 ugetrlimit vfork wait4 waitid waitpid
"""
_SIGNALS_AND_LOCKS = """
futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake kill pause rt_sigaction
rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait
rt_sigtimedwait_time64 rt_tgsigqueueinfo sgetmask sigaction sigaltstack signal sigpending
sigprocmask sigreturn sigsuspend ssetmask tgkill tkill
"""
_IPC = """
ipc mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend
mq_timedsend_time64 mq_unlink msgctl msgget msgrcv msgsnd semctl semget semop semtimedop
semtimedop_time64 shmat shmctl shmdt shmget
"""
_TIME_AND_FACTS = """
alarm clock_getres clock_getres_time64 clock_gettime clock_gettime64 clock_nanosleep
clock_nanosleep_time64 getitimer getrandom gettimeofday nanosleep oldolduname olduname setitimer
sysinfo time timer_create timer_delete timer_getoverrun timer_gettime timer_gettime64
timer_settime timer_settime64 times uname
"""
#: Private to one architecture: caches and thread pointers of 32-bit ARM and of RISC-V.
_ARCHITECTURE = "breakpoint cacheflush get_tls riscv_flush_icache set_tls usr26 usr32"

#: Allowed whatever the arguments.
ALLOWED = frozenset(
    " ".join(
        (
            _FILES,
            _WAITING,
            _NETWORK,
            _MEMORY,
            _PROCESSES,
            _SIGNALS_AND_LOCKS,
            _IPC,
            _TIME_AND_FACTS,
            _ARCHITECTURE,
        )
    ).split()
)


_BUILDING = """
fsconfig fsmount fsopen keyctl mount mount_setattr move_mount open_tree pivot_root sethostname
setns umount2 unshare
"""
#: What only the launcher needs, to build a sandbox, and what a built sandbox is answered. A C
#: library that is told EPERM for clone3 gives up, with ENOSYS it uses clone.
BUILDING = dict.fromkeys(_BUILDING.split(), errno.EPERM) | {"clone3": errno.ENOSYS}


@dataclass(frozen=True)
class Test:
    """An argument, cut to ``mask``, equals ``value``.

    The kernel takes all of these arguments as 32-bit numbers, so what a caller leaves in the
    upper half must not change the verdict.
    """

    argument: int
    value: int
    mask: int = 0xFFFFFFFF


_STREAM_OR_DATAGRAM = (socket.SOCK_STREAM, socket.SOCK_DGRAM)
_NEW_NAMESPACES = 0x7E020000  # CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}; NEWTIME is clone3's

#: Allowed where one of these alternatives holds as a whole.
ALLOWED_IF: dict[str, tuple[tuple[Test, ...], ...]] = {
    # Threads and processes, but no namespace. clone3 hides its flags in memory.
    "clone": ((Test(0, 0, _NEW_NAMESPACES),),),
    # Local sockets; TCP, UDP and ICMP's echo (protocols below 64: no SCTP, L2TP, MPTCP, SMC; no
    # other types: no raw ones, DCCP, SCTP); of netlink what getifaddrs(3) asks, NETLINK_ROUTE.
    "socket": (
        (Test(0, socket.AF_UNIX),),
        *(
            (Test(0, family), Test(1, kind, 0xF), Test(2, 0, 0xFFFFFFC0))
            for family in (socket.AF_INET, socket.AF_INET6)
            for kind in _STREAM_OR_DATAGRAM
        ),
        (Test(0, socket.AF_NETLINK), Test(2, 0)),
    ),
    "socketpair": ((Test(0, socket.AF_UNIX),),),
    # PER_LINUX, PER_LINUX32 and the query; nothing that weakens address randomisation.
    "personality": tuple((Test(0, persona),) for persona in (0, 8, 0xFFFFFFFF)),
}

_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)
_TIOCSTI, _TIOCLINUX, _TIOCSETD = 0x5412, 0x541C, 0x5423

#: Refused with an error where one of these holds, whatever else allows it.
REFUSED_IF: dict[str, tuple[int, tuple[Test, ...]]] = {
    # TIOCSTI types into the terminal, TIOCLINUX pastes; TIOCSETD loads line disciplines.
    "ioctl": (errno.EPERM, tuple(Test(1, n) for n in (_TIOCSTI, _TIOCLINUX, _TIOCSETD))),
    # Already refused above: this gives the error that a kernel without the family gives.
    "socket": (errno.EAFNOSUPPORT, tuple(Test(0, f) for f in range(64) if f not in _FAMILIES)),
    # One number for all socket calls of 32-bit x86, with their arguments in memory where no
    # filter can look. Programs that make sockets this way (1: socket, 8: socketpair) get none.
    "socketcall": (errno.EAFNOSUPPORT, (Test(0, 1), Test(0, 8))),
}

#: Whose verdict depends on their arguments, the most frequent first. The kernel remembers the
#: verdict on the others (since 5.11) and runs the filter for these only, so they come first.
FREQUENT = ("ioctl", "clone", "socket", "socketpair")
