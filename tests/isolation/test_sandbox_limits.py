"""Resource limits: each at its edge, with the same program beside it where the limit is wide."""

from __future__ import annotations

import signal

from isolation_support import Box

from sandboxd.isolation.wire import Limits


async def test_open_files_are_limited(box: Box) -> None:
    probe = """
opened = []
try:
    while len(opened) < 200:
        opened.append(os.open("/dev/null", os.O_RDONLY))
    end = "none"
except OSError as failure:
    end = errno.errorcode[failure.errno]
tell(end=end, highest=max(opened), limit=resource.getrlimit(resource.RLIMIT_NOFILE))"""
    seen = await box.probe(probe, limits=Limits(open_files=32))
    assert seen == {"end": "EMFILE", "highest": 31, "limit": [32, 32]}
    assert (await box.probe(probe))["end"] == "none"


async def test_a_fork_bomb_is_bounded(box: Box) -> None:
    probe = """
children, end = [], "none"
try:
    while len(children) < 60:
        pid = os.fork()
        if pid == 0:
            signal.pause()
        children.append(pid)
except OSError as failure:
    end = errno.errorcode[failure.errno]
tell(end=end, count=len(children))"""
    seen = await box.probe(probe, limits=Limits(processes=20))
    assert (seen["end"], seen["count"]) == ("EAGAIN", 18)  # the init and the program count too
    assert await box.probe(probe, limits=Limits(processes=100)) == {"end": "none", "count": 60}


async def test_one_sandboxs_processes_do_not_count_against_anothers(box: Box) -> None:
    limits = Limits(processes=8)
    crowd = "for i in 1 2 3 4 5; do /bin/sleep 60 & done; echo ready; wait"
    async with box.start("/bin/sh", "-c", crowd, limits=limits) as first:
        await first.ready()
        assert (await box.sh("(/bin/true) && echo fine", limits=limits)).out == b"fine\n"


async def test_a_file_can_not_grow_beyond_its_limit(box: Box) -> None:
    probe = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
fd = os.open("/tmp/big", os.O_CREAT | os.O_WRONLY)
first, second = os.write(fd, bytes(8192)), attempt(os.write, fd, b"x")
tell(first=first, second=second)"""
    assert await box.probe(probe, limits=Limits(file_size=4096)) == {
        "first": 4096,
        "second": "EFBIG",
    }
    assert await box.probe(probe) == {"first": 8192, "second": "ok"}
    ended = await box.sh("head -c 8192 /dev/zero >/tmp/big", limits=Limits(file_size=4096))
    assert ended.exit.code == 128 + signal.SIGXFSZ


async def test_nothing_dumps_core(box: Box) -> None:
    seen = await box.probe("tell(core=resource.getrlimit(resource.RLIMIT_CORE))")
    assert seen == {"core": [0, 0]}


async def test_private_memory_is_bounded_in_bytes_and_in_files(box: Box) -> None:
    probe = """
def fill(directory):
    fd = os.open(directory + "/fill", os.O_CREAT | os.O_WRONLY)
    block, total = bytes(1 << 16), 0
    try:
        while total < 4 << 20:
            total += os.write(fd, block)
    except OSError as failure:
        return [total, errno.errorcode[failure.errno]]
    finally:
        os.close(fd)
        os.unlink(directory + "/fill")
    return [total, "ok"]
def litter(directory):
    for number in range(3000):
        done = attempt(os.mkdir, f"{directory}/{number}")
        if done != "ok":
            return done
    return "ok"
places = ("/tmp", "/home/agent", "/dev/shm")
tell(bytes=[fill(p) for p in places], files=litter("/tmp"))"""
    seen = await box.probe(probe, limits=Limits(tmp_size=1 << 20))
    assert seen == {"bytes": [[1 << 20, "ENOSPC"]] * 3, "files": "ENOSPC"}
    wide = await box.probe(probe, limits=Limits(tmp_size=16 << 20))
    assert wide == {"bytes": [[4 << 20, "ok"]] * 3, "files": "ok"}


async def test_memory_of_one_process_is_limited(box: Box) -> None:
    probe = """
try:
    block = bytearray(96 << 20)
    tell(got=len(block))
except MemoryError:
    tell(got=0)"""
    assert await box.probe(probe, limits=Limits(memory=64 << 20)) == {"got": 0}
    assert await box.probe(probe, limits=Limits(memory=256 << 20)) == {"got": 96 << 20}


async def test_cpu_time_runs_out(box: Box) -> None:
    result = await box.sh("while :; do :; done", limits=Limits(cpu_seconds=1))
    assert result.exit.signal in (signal.SIGKILL, signal.SIGXCPU)
    assert 500 <= result.exit.cpu_ms < 2000  # the limit is checked at clock ticks


async def test_use_of_cpu_and_memory_is_reported(box: Box) -> None:
    argv, more = box.python("block = bytearray(64 << 20); sum(range(2_000_000)); tell()")
    result = await box.run(*argv, **more)
    assert result.exit.max_rss_kib > 64 << 10
    assert result.exit.cpu_ms > 0
