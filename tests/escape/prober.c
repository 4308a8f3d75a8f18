/*
 * What Python can't do: system calls by every way into the kernel, with every bit of their
 * arguments. Prints "NAME OUTCOME" for each: ok, an errno's number, or "signal N". Arguments are
 * such that success is harmless. Built with: gcc -static -O1 -o prober prober.c
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define HIGH (1UL << 32)
#define X32 0x40000000L

typedef long (*attack)(const long *);

static long native(const long *a)
{
	return syscall(a[0], a[1], a[2], a[3], a[4], a[5], a[6]) < 0 ? -errno : 0;
}

/* A new process that ends at once; what clone(2) and clone3(2) answer to the one who asked. */
static long cloning(const long *a)
{
	long pid = syscall(SYS_clone, a[0] | SIGCHLD, 0, 0, 0, 0);

	if (pid == 0)
		_exit(0);
	return pid < 0 ? -errno : 0;
}

static long cloning3(const long *a)
{
	uint64_t arguments[11] = { (uint64_t)a[0], 0, 0, 0, SIGCHLD };
	long pid = syscall(SYS_clone3, arguments, sizeof(arguments));

	if (pid == 0)
		_exit(0);
	return pid < 0 ? -errno : 0;
}

/* ioctl(2) on a terminal that is the caller's own. */
static long on_terminal(const long *a)
{
	static char argument[64] = "x";
	int master = posix_openpt(O_RDWR | O_NOCTTY), slave;

	if (master < 0 || unlockpt(master) < 0)
		return -ENXIO;
	setsid();
	slave = open(ptsname(master), O_RDWR);
	if (slave < 0)
		return -ENXIO;
	if (a[1])
		memset(argument, (int)a[1], 1);
	return syscall(SYS_ioctl, slave, a[0], argument) < 0 ? -errno : 0;
}

#ifdef __x86_64__
/* The 32-bit table, by its own gate. Pointers have to lie below 4 GiB. */
static long gate(long nr, long b, long c, long d, long e, long f)
{
	long result;
	register long r8 __asm__("r8"), r9 __asm__("r9"), r10 __asm__("r10"), r11 __asm__("r11");

	__asm__ volatile("int $0x80"
			 : "=a"(result), "=r"(r8), "=r"(r9), "=r"(r10), "=r"(r11)
			 : "a"(nr), "b"(b), "c"(c), "d"(d), "S"(e), "D"(f)
			 : "memory");
	return result;
}

static long compat(const long *a)
{
	long result = gate(a[0], a[1], a[2], a[3], a[4], a[5]);

	return result < 0 ? result : 0;
}

static long compat_cloning(const long *a)
{
	long pid = gate(120, a[0] | SIGCHLD, 0, 0, 0, 0);

	if (pid == 0)
		_exit(0);
	return pid < 0 ? pid : 0;
}

static long compat_socket(const long *a)
{
	int32_t *arguments = mmap(NULL, 4096, PROT_READ | PROT_WRITE,
				  MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
	long result;

	if (arguments == MAP_FAILED)
		return -ENOMEM;
	arguments[0] = (int32_t)a[0];
	arguments[1] = (int32_t)a[1];
	arguments[2] = (int32_t)a[2];
	result = gate(102, 1, (long)arguments, 0, 0, 0); /* socketcall(SYS_SOCKET) */
	return result < 0 ? result : 0;
}

static long compat_on_terminal(const long *a)
{
	char *argument = mmap(NULL, 4096, PROT_READ | PROT_WRITE,
			      MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
	int master = posix_openpt(O_RDWR | O_NOCTTY), slave;
	long result;

	if (argument == MAP_FAILED || master < 0 || unlockpt(master) < 0)
		return -ENXIO;
	argument[0] = 'x';
	setsid();
	slave = open(ptsname(master), O_RDWR);
	if (slave < 0)
		return -ENXIO;
	result = gate(54, slave, a[0], (long)argument, 0, 0);
	return result < 0 ? result : 0;
}
#endif

static void tried(const char *name, attack run, const long *arguments)
{
	int status, ends[2];
	long outcome = 0;
	pid_t pid;

	if (pipe(ends) < 0 || (pid = fork()) < 0) {
		printf("%s broke\n", name);
		return;
	}
	if (pid == 0) {
		outcome = run(arguments);
		if (write(ends[1], &outcome, sizeof(outcome)) < 0)
			_exit(2);
		_exit(0);
	}
	close(ends[1]);
	if (read(ends[0], &outcome, sizeof(outcome)) != sizeof(outcome))
		outcome = 1;
	close(ends[0]);
	waitpid(pid, &status, 0);
	if (WIFSIGNALED(status))
		printf("%s signal %d\n", name, WTERMSIG(status));
	else if (outcome == 0)
		printf("%s ok\n", name);
	else
		printf("%s %ld\n", name, -outcome);
	fflush(stdout);
}

#define TRY(name, run, ...) tried(name, run, (const long[8]){ __VA_ARGS__ })

int main(void)
{
	TRY("native:getpid", native, SYS_getpid);
	TRY("native:no-such-call", native, -1);
	TRY("native:no-such-call-high", native, 100000);

	TRY("clone:user", cloning, 0x10000000);
	TRY("clone:user-mount", cloning, 0x10020000);
	TRY("clone:user-network", cloning, 0x50000000);
	TRY("clone:user-pid", cloning, 0x30000000);
	TRY("clone:user-high", cloning, 0x10000000 | HIGH);
	TRY("clone:none", cloning, 0);
	TRY("clone3:user", cloning3, 0x10000000);
	TRY("clone3:time", cloning3, 0x10000080);
	TRY("unshare:user", native, SYS_unshare, 0x10000000);
	TRY("unshare:user-high", native, SYS_unshare, 0x10000000 | HIGH);
	TRY("unshare:user-negative", native, SYS_unshare, (long)0xffffffff10000000);
	TRY("unshare:files", native, SYS_unshare, 0x400);

	TRY("tty:size", on_terminal, 0x5413);
	TRY("tty:tiocsti", on_terminal, 0x5412);
	TRY("tty:tiocsti-bit32", on_terminal, 0x5412 | HIGH);
	TRY("tty:tiocsti-bit63", on_terminal, (long)(0x5412 | 1UL << 63));
	TRY("tty:tiocsti-ones", on_terminal, (long)(0xffffffff00005412));
	TRY("tty:tioclinux", on_terminal, 0x541C, 2);
	TRY("tty:tioclinux-bit32", on_terminal, 0x541C | HIGH, 2);
	TRY("tty:tiocsetd-bit32", on_terminal, 0x5423 | HIGH, 0);

	TRY("socket:unix", native, SYS_socket, 1, 1, 0);
	TRY("socket:unix-high", native, SYS_socket, 1 | HIGH, 1, 0);
	TRY("socket:vsock", native, SYS_socket, 40, 1, 0);
	TRY("socket:vsock-high", native, SYS_socket, 40 | HIGH, 1, 0);
	TRY("socket:netfilter-high", native, SYS_socket, 16 | HIGH, 3 | HIGH, 12 | HIGH);
	TRY("socket:alg-high", native, SYS_socket, 38 | HIGH, 5, 0);
	TRY("socketpair:tipc", native, SYS_socketpair, 30, 5, 0, (long)(int[2]){ 0 });
	TRY("personality:query", native, SYS_personality, 0xffffffff);
	TRY("personality:fixed-high", native, SYS_personality, 0x40000 | HIGH);

#ifdef __x86_64__
	TRY("x32:getpid", native, X32 | 39);
	TRY("x32:ioctl", native, X32 | 514, 0, 0x5413, 0);
	TRY("x32:execve", native, X32 | 520, 0, 0, 0);
	TRY("x32:ptrace", native, X32 | 521, 0, 0, 0, 0);
	TRY("x32:kexec_load", native, X32 | 528, 0, 0, 0, 0);
	TRY("x32:io_uring_setup", native, X32 | 425, 1, 0);
	TRY("x32:native-io_uring", native, (X32 << 1) | 425, 1, 0);

	TRY("i386:getpid", compat, 20);
	TRY("i386:ptrace", compat, 26, 0, 0, 0, 0);
	TRY("i386:mount", compat, 21, 0, 0, 0, 0, 0);
	TRY("i386:personality", compat, 136, 0x40000);
	TRY("i386:kexec_load", compat, 283, 0, 99, 0, 0);
	TRY("i386:add_key", compat, 286, 0, 0, 0, 0, -3);
	TRY("i386:keyctl", compat, 288, 0, -3, 0, 0);
	TRY("i386:unshare-user", compat, 310, 0x10000000);
	TRY("i386:clone-user", compat_cloning, 0x10000000);
	TRY("i386:perf_event_open", compat, 336, 0, 0, -1, -1, 0);
	TRY("i386:open_by_handle_at", compat, 342, -100, 0, 0);
	TRY("i386:setns", compat, 346, -1, 0);
	TRY("i386:kcmp", compat, 349, 1, 1, 1, 0, 0);
	TRY("i386:socket-unix", compat_socket, 1, 1, 0);
	TRY("i386:socket-vsock", compat_socket, 40, 1, 0);
	TRY("i386:socket-netfilter", compat_socket, 16, 3, 12);
	TRY("i386:bpf", compat, 357, 0, 0, 0);
	TRY("i386:socket-direct", compat, 359, 40, 1, 0);
	TRY("i386:userfaultfd", compat, 374, 1);
	TRY("i386:io_uring_setup", compat, 425, 1, 0);
	TRY("i386:vm86old", compat, 113, 0);
	TRY("i386:modify_ldt", compat, 123, 0, 0, 0);
	TRY("i386:tiocsti", compat_on_terminal, 0x5412);
	TRY("i386:tty-size", compat_on_terminal, 0x5413);
	TRY("i386:no-such-call", compat, 9999);
#endif
	return 0;
}
