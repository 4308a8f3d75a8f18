"""tools/git over a real smart HTTP server with a password, in repositories that set traps."""

from __future__ import annotations

import base64
import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from git_hub import TOKEN, USERNAME, Hub, commit, git, needs_git

pytestmark = needs_git


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    path = tmp_path / "workspace"
    path.mkdir()
    return path


@pytest.fixture
def call(run_tool: Any, hub: Hub, workspace: Path, tmp_path: Path) -> Callable[..., Any]:
    """Call the tool for an agent that may use ``hub``; no call may leave the token anywhere."""
    private = tmp_path / "private"
    private.mkdir()

    def run(arguments: Any, **environment: str) -> Any:
        base = {"REPOSITORY_TOKEN": TOKEN, "REPOSITORY_HOSTS": hub.origin, "TMPDIR": str(private)}
        ran = run_tool("git", arguments, base | environment, workspace)
        assert TOKEN not in ran.everything
        assert not list(private.iterdir())
        for folder, _, files in os.walk(workspace):
            for name in files:
                path = Path(folder, name)
                assert path.is_symlink() or TOKEN.encode() not in path.read_bytes(), path
        return ran

    return run


@pytest.fixture
def clone(call: Any, hub: Hub, workspace: Path) -> Path:
    assert call({"operation": "clone", "url": hub.url, "directory": "shop"}).status == 0
    return workspace / "shop"


def tip(hub: Hub, branch: str) -> str:
    return git("rev-parse", f"refs/heads/{branch}", cwd=hub.bare)


# --- what it is for ---


def test_a_clone_is_an_ordinary_repository_without_the_token(
    call: Any, hub: Hub, workspace: Path
) -> None:
    answer = call({"operation": "clone", "url": hub.url, "directory": "a/shop"}).answer
    shop = workspace / "a" / "shop"
    assert (shop / "README").read_text() == "hello\n"
    assert answer["branch"] == "trunk"
    assert answer["commit"] == git("rev-parse", "HEAD", cwd=shop) == tip(hub, "trunk")
    assert git("status", "--porcelain", "--branch", cwd=shop) == "## trunk...origin/trunk"
    assert git("remote", "get-url", "origin", cwd=shop) == hub.url
    assert "origin/topic" in git("branch", "-r", cwd=shop)
    assert git("fsck", "--strict", cwd=shop) == ""
    basic = base64.b64encode(f"{USERNAME}:{TOKEN}".encode()).decode()
    assert f"Basic {basic}" in hub.authorizations


def test_a_clone_can_choose_branch_and_depth(call: Any, hub: Hub, workspace: Path) -> None:
    source = workspace.parent / "source"
    commit(source, "more", "1")
    git("push", "-q", hub.bare, "trunk", cwd=source)
    arguments = {"operation": "clone", "url": hub.url, "directory": "shop"}
    assert call(arguments | {"branch": "nothing"}).status == 1
    assert not (workspace / "shop").exists()
    assert call(arguments | {"branch": "trunk", "depth": 1}).answer["branch"] == "trunk"
    assert git("rev-list", "--count", "HEAD", cwd=workspace / "shop") == "1"
    assert git("rev-parse", "--is-shallow-repository", cwd=workspace / "shop") == "true"


def test_an_empty_repository_can_be_cloned(call: Any, hub: Hub, workspace: Path) -> None:
    git("init", "-q", "--bare", "-b", "trunk", hub.root / "empty.git", cwd=hub.root)
    answer = call(
        {"operation": "clone", "url": f"{hub.origin}/empty.git", "directory": "empty"}
    ).answer
    assert answer["commit"] is None
    commit(workspace / "empty", "first", "1")


def test_fetch_brings_what_is_new(call: Any, hub: Hub, clone: Path, workspace: Path) -> None:
    source = workspace.parent / "source"
    new = commit(source, "more", "1")
    git("push", "-q", hub.bare, "trunk", "trunk:other", cwd=source)
    answer = call({"operation": "fetch", "directory": "shop"}).answer
    assert answer["updated"] == {
        "refs/remotes/origin/other": new,
        "refs/remotes/origin/trunk": new,
        "refs/remotes/origin/HEAD": new,
    }
    assert git("merge", "--ff-only", "origin/trunk", cwd=clone).startswith("Updating")
    assert call({"operation": "fetch", "directory": "shop"}).answer["updated"] == {}


def test_push_sends_the_current_branch(call: Any, hub: Hub, clone: Path) -> None:
    new = commit(clone, "mine", "1")
    answer = call({"operation": "push", "directory": "shop"}).answer
    assert (answer["branch"], answer["commit"]) == ("trunk", new)
    assert tip(hub, "trunk") == new
    assert git("status", "--porcelain", "--branch", cwd=clone) == "## trunk...origin/trunk"
    answer = call({"operation": "push", "directory": "shop", "to": "feature/x"}).answer
    assert tip(hub, "feature/x") == new


def test_push_overwrites_only_with_force(call: Any, hub: Hub, clone: Path) -> None:
    commit(clone, "mine", "1")
    assert call({"operation": "push", "directory": "shop"}).status == 0
    git("reset", "-q", "--hard", "HEAD~1", cwd=clone)
    other = commit(clone, "mine", "2")
    ran = call({"operation": "push", "directory": "shop"})
    assert ran.status == 1
    assert "rejected" in ran.stderr
    assert tip(hub, "trunk") != other
    assert call({"operation": "push", "directory": "shop", "force": True}).status == 0
    assert tip(hub, "trunk") == other


def test_the_workspace_itself_may_be_the_repository(
    call: Any, hub: Hub, clone: Path, workspace: Path
) -> None:
    (clone / ".git").rename(workspace / ".git")
    assert call({"operation": "fetch"}).answer["directory"] == ""


def test_packed_refs_and_loose_ones_work_alike(call: Any, hub: Hub, clone: Path) -> None:
    git("pack-refs", "--all", cwd=clone)
    git("gc", "-q", cwd=clone)
    commit(clone, "mine", "1")
    assert call({"operation": "fetch", "directory": "shop"}).answer["updated"] == {}
    assert call({"operation": "push", "directory": "shop"}).status == 0


def test_the_operator_can_set_the_user_name(call: Any, hub: Hub) -> None:
    hub.username = "deploy"
    arguments = {"operation": "clone", "url": hub.url, "directory": "shop"}
    assert call(arguments).status == 1
    assert call(arguments, REPOSITORY_USERNAME="deploy").status == 0


def test_a_wrong_token_is_told_and_leaves_nothing(call: Any, hub: Hub, workspace: Path) -> None:
    hub.password = "another"
    ran = call({"operation": "clone", "url": hub.url, "directory": "shop"})
    assert ran.status == 1
    assert "Authentication failed" in ran.stderr
    assert list(workspace.iterdir()) == []


def test_https_is_checked_against_the_trusted_authorities(
    call: Any, hub: Hub, serve: Any, certificate: Path, workspace: Path
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with serve(hub.handler(), context) as port:
        origin = f"https://localhost:{port}"
        arguments = {"operation": "clone", "url": f"{origin}/shop.git", "directory": "shop"}
        ran = call(arguments, REPOSITORY_HOSTS=origin)
        assert ran.status == 1
        assert "certificate" in ran.stderr
        assert not hub.authorizations
        assert call(arguments, REPOSITORY_HOSTS=origin, SSL_CERT_FILE=str(certificate)).status == 0


# --- where the token may not go ---


def test_another_origin_gets_neither_request_nor_token(
    call: Any, hub: Hub, serve: Any, workspace: Path
) -> None:
    with serve(hub.handler()) as port:
        url = f"http://127.0.0.1:{port}/shop.git"
        arguments = {"operation": "clone", "url": url, "directory": "shop"}
        ran = call(arguments)
        assert ran.status == 4
        assert "REPOSITORY_HOSTS" in ran.stderr
        assert not hub.authorizations
        both = f"{hub.origin} http://127.0.0.1:{port}"
        assert call(arguments, REPOSITORY_HOSTS=both).status == 0


def test_a_redirect_is_not_followed(call: Any, hub: Hub, open_site: Any, workspace: Path) -> None:
    other = open_site()
    hub.redirect = other.origin
    arguments = {"operation": "clone", "url": hub.url, "directory": "shop"}
    assert call(arguments, REPOSITORY_HOSTS=f"{hub.origin} {other.origin}").status == 1
    assert hub.authorizations
    assert not other.seen
    hub.redirect = ""
    assert call(arguments).status == 0


#: {bare} and the rest are filled in by the test.
URLS = [
    "file://{bare}",
    "{bare}",
    "../hub/shop.git",
    "ext::sh -c 'touch {trap}'",
    "ext::sh% -c% touch% {trap}",
    "ssh://127.0.0.1/shop.git",
    "git@127.0.0.1:shop.git",
    "git://127.0.0.1/shop.git",
    "fd::3",
    "http::{origin}/shop.git",
    "--upload-pack=touch {trap}",
    "http://user:pw@{place}/shop.git",
    "http://{place}@evil.example/shop.git",
    "{origin}/shop.git?x=1",
    "{origin}/shop.git#x",
    "{origin}/a/../shop.git",
    "{origin}/%2e%2e/shop.git",
    "{origin}/shop.git\nx",
    "{origin}",
    "http://evil.example\\@{place}/shop.git",
]


@pytest.mark.parametrize("operation", ["clone", "fetch"])
def test_no_other_transport_or_spelling_is_possible(
    call: Any, hub: Hub, clone: Path, workspace: Path, tmp_path: Path, operation: str
) -> None:
    trap = tmp_path / "trap"
    place = hub.origin.removeprefix("http://")
    words = {"bare": hub.bare, "trap": trap, "place": place, "origin": hub.origin}
    before = len(hub.authorizations)
    directory = "new" if operation == "clone" else "shop"
    for url in URLS:
        for name, value in words.items():
            url = url.replace("{" + name + "}", str(value))
        ran = call({"operation": operation, "url": url, "directory": directory})
        assert ran.status in (2, 4), (url, ran.everything)
    assert len(hub.authorizations) == before
    assert not trap.exists()
    assert not (workspace / "new").exists()
    git("clone", "-q", f"file://{hub.bare}", tmp_path / "control", cwd=tmp_path)  # git itself can
    assert call({"operation": operation, "url": hub.url, "directory": directory}).status == 0


def test_a_remotes_url_in_the_repository_is_checked_like_any_other(
    call: Any, hub: Hub, clone: Path, open_site: Any
) -> None:
    other = open_site()
    for url in (f"{other.origin}/shop.git", f"file://{hub.bare}", "ext::sh -c true"):
        git("config", "remote.origin.url", url, cwd=clone)
        for operation in ("fetch", "push"):
            assert call({"operation": operation, "directory": "shop"}).status == 4
    assert not other.seen
    git("config", "remote.origin.url", hub.url, cwd=clone)
    assert call({"operation": "fetch", "directory": "shop"}).status == 0


# --- traps in the repository ---

#: Each runs, contacts or moves something when git itself meets it in .git/config; {run} is a
#: program, {other} a server, {folder} holds hooks.
TRAPS = {
    "hooks path": "[core]\n\thooksPath = {folder}\n",
    "fsmonitor": "[core]\n\tfsmonitor = {run}\n",
    "ssh command": "[core]\n\tsshCommand = {run}\n",
    "git proxy": "[core]\n\tgitProxy = {run}\n",
    "alternate refs": "[core]\n\talternateRefsCommand = {run}\n",
    "askpass": "[core]\n\taskPass = {run}\n",
    "worktree": "[core]\n\tworktree = {folder}\n",
    "credential helper": '[credential]\n\thelper = "!{run}"\n',
    "credential helper of the url": '[credential "{origin}"]\n\thelper = "!{run}"\n',
    "instead of": '[url "{other}/"]\n\tinsteadOf = {origin}/\n',
    "push instead of": '[url "{other}/"]\n\tpushInsteadOf = {origin}/\n',
    "instead of, a program": '[url "ext::{run} "]\n\tinsteadOf = {origin}/\n'
    '[protocol "ext"]\n\tallow = always\n',
    "proxy": "[http]\n\tproxy = {other}\n",
    "proxy of the url": '[http "{origin}"]\n\tproxy = {other}\n',
    "proxy of the remote": '[remote "origin"]\n\tproxy = {other}\n',
    "extra header": "[http]\n\textraHeader = X-Trap: 1\n",
    "curl resolve": "[http]\n\tcurloptResolve = 127.0.0.1:1:127.0.0.1\n",
    "cookie file": "[http]\n\tcookieFile = {folder}/cookies\n\tsaveCookies = true\n",
    "receive pack": '[remote "origin"]\n\treceivepack = {run}\n\tuploadpack = {run}\n',
    "remote helper": '[remote "origin"]\n\tvcs = trap\n',
    "push url": '[remote "origin"]\n\tpushurl = {other}/shop.git\n',
    "signing program": "[push]\n\tgpgSign = true\n[gpg]\n\tprogram = {run}\n",
    "include": "[include]\n\tpath = {folder}/included\n",
    "submodules": "[submodule]\n\trecurse = true\n[fetch]\n\trecurseSubmodules = true\n",
    "pack filter": "[uploadpack]\n\tpackObjectsHook = {run}\n",
}


@pytest.mark.parametrize("first", range(5))
def test_a_trap_in_the_configuration_is_never_sprung(
    call: Any, hub: Hub, clone: Path, tmp_path: Path, open_site: Any, first: int
) -> None:
    other = open_site()
    sprung, folder, run = tmp_path / "sprung", tmp_path / "traps", tmp_path / "traps" / "run"
    folder.mkdir()
    run.write_text(f"#!/bin/sh\nenv >> {sprung}\n")
    run.chmod(0o755)
    for hook in ("reference-transaction", "pre-push", "post-checkout", "post-index-change"):
        (folder / hook).symlink_to(run)
    (folder / "included").write_text(f"[core]\n\thooksPath = {folder}\n")
    words = {"run": run, "folder": folder, "origin": hub.origin, "other": other.origin}
    commit(clone, "mine", "1")
    with open(clone / ".git" / "config", "a") as config:
        for trap in list(TRAPS.values())[first::5]:
            for word, value in words.items():
                trap = trap.replace("{" + word + "}", str(value))
            config.write(trap)
    for operation in ("fetch", "push"):
        assert call({"operation": operation, "directory": "shop"}).status == 0
    assert not sprung.exists()
    assert not other.seen
    assert tip(hub, "trunk") == (clone / ".git/refs/heads/trunk").read_text().strip()


def test_the_same_traps_do_run_in_git_itself(clone: Path, tmp_path: Path) -> None:
    """The control of the test above, for the two kinds of trap: a program, and a hook."""
    for key, value in (("core.fsmonitor", "touch {}; false"), ("core.hooksPath", "{}")):
        sprung = tmp_path / key
        folder = tmp_path / f"{key}.d"
        folder.mkdir()
        hook = folder / "reference-transaction"
        hook.write_text(f"#!/bin/sh\ntouch {sprung}\n")
        hook.chmod(0o755)
        setting = value.format(sprung if key == "core.fsmonitor" else folder)
        git("-c", f"{key}={setting}", "status", cwd=clone)
        git("-c", f"{key}={setting}", "update-ref", "refs/heads/x", "HEAD", cwd=clone)
        assert sprung.exists()


def test_hooks_in_the_repository_do_not_run(call: Any, hub: Hub, clone: Path) -> None:
    sprung = clone.parent / "sprung"
    hooks = clone / ".git" / "hooks"
    hooks.mkdir(exist_ok=True)
    for name in ("reference-transaction", "pre-push", "post-checkout", "pre-auto-gc"):
        (hooks / name).write_text(f"#!/bin/sh\ntouch {sprung}\n")
        (hooks / name).chmod(0o755)
    for operation in ("fetch", "push"):
        assert call({"operation": operation, "directory": "shop"}).status == 0
    assert not sprung.exists()
    git("update-ref", "refs/heads/control", "HEAD", cwd=clone)
    assert sprung.exists()


def test_what_a_remote_brings_along_does_not_run(
    call: Any, hub: Hub, workspace: Path, tmp_path: Path
) -> None:
    """Filters, submodules and hooks in the tree that is cloned."""
    source = tmp_path / "source"
    sprung = tmp_path / "sprung"
    (source / ".gitattributes").write_text("* filter=trap diff=trap merge=trap\n")
    (source / ".gitmodules").write_text(
        f'[submodule "sub"]\n\tpath = sub\n\turl = {tmp_path}\n\tupdate = "!touch {sprung}"\n'
    )
    (source / ".githooks").mkdir()
    (source / ".githooks" / "post-checkout").write_text(f"#!/bin/sh\ntouch {sprung}\n")
    (source / ".githooks" / "post-checkout").chmod(0o755)
    git("add", ".", cwd=source)
    head = git("rev-parse", "HEAD", cwd=source)
    git("update-index", "--add", "--cacheinfo", f"160000,{head},sub", cwd=source)
    git("commit", "-q", "-m", "Traps", cwd=source)
    git("push", "-q", hub.bare, "trunk", cwd=source)
    assert call({"operation": "clone", "url": hub.url, "directory": "shop"}).status == 0
    assert not sprung.exists()
    assert list((workspace / "shop" / "sub").iterdir()) == []
    filtered = ["-c", f"filter.trap.smudge=touch {sprung}; cat"]
    (workspace / "shop" / "README").unlink()
    git(*filtered, "checkout", "-f", "HEAD", "--", "README", cwd=workspace / "shop")
    assert sprung.exists()


def test_the_token_is_in_no_argument_vector_and_only_talkers_have_it(
    call: Any, hub: Hub, clone: Path, tmp_path: Path
) -> None:
    """Watch every git process of a push through a wrapper that stands in the tool's PATH."""
    log = tmp_path / "log"
    program = Path(__file__).resolve().parents[2] / "tools" / "git" / "program.py"
    wrapper = tmp_path / "bin"
    wrapper.mkdir()
    (wrapper / "git").write_text(
        f'#!/bin/sh\nprintf "%s\\n" "ARGV $*" >> {log}\n'
        f'echo "${{GIT_TOOL_TOKEN:+TOKEN}} $1" >> {log}\nexec /usr/bin/git "$@"\n'
    )
    (wrapper / "git").chmod(0o755)
    copy = tmp_path / "program.py"
    words = program.read_text()
    assert words.count('"/usr/local/bin:/usr/bin:/bin"') == 1
    copy.write_text(words.replace('"/usr/local/bin:', f'"{wrapper}:'))
    commit(clone, "mine", "1")
    done = subprocess.run(
        [sys.executable, "-I", "-B", copy, clone.parent],
        env={"REPOSITORY_TOKEN": TOKEN, "REPOSITORY_HOSTS": hub.origin},
        input='{"operation": "push", "directory": "shop"}',
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = log.read_text().splitlines()
    assert not any(TOKEN in line for line in lines)
    assert [line for line in lines if line.startswith("TOKEN")] == ["TOKEN push"]
    assert any(line == " update-ref" for line in lines)


# --- paths ---


@pytest.mark.parametrize("operation", ["clone", "fetch"])
def test_a_directory_outside_the_workspace_is_refused(
    call: Any, hub: Hub, clone: Path, operation: str
) -> None:
    url = {"url": hub.url} if operation == "clone" else {}
    bad = ["../out", "/etc", "a/../../out", ".git", "shop/.git/x", "shop/.GIT", "-x", "a//b", "."]
    for directory in [*bad, "a\nb"]:
        ran = call({"operation": operation, "directory": directory} | url)
        assert ran.status in (2, 4), directory
    assert not (clone.parent.parent / "out").exists()
    assert call({"operation": "fetch", "directory": "/workspace/shop"}).status == 0


def test_symbolic_links_on_the_way_are_refused(
    call: Any, hub: Hub, clone: Path, workspace: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(clone, outside)
    (workspace / "link").symlink_to(outside)
    (workspace / "dangling").symlink_to(tmp_path / "new")
    before = git("rev-parse", "HEAD", cwd=outside)
    for arguments in (
        {"operation": "fetch", "directory": "link"},
        {"operation": "clone", "url": hub.url, "directory": "link/new"},
        {"operation": "clone", "url": hub.url, "directory": "dangling"},
    ):
        assert call(arguments).status == 4
    assert git("rev-parse", "HEAD", cwd=outside) == before
    assert not (tmp_path / "new").exists()
    assert not (outside / "new").exists()
    assert call({"operation": "fetch", "directory": "shop"}).status == 0


@pytest.mark.parametrize(
    "part", [".git", ".git/objects", ".git/refs", ".git/refs/remotes/origin", ".git/HEAD"]
)
def test_symbolic_links_inside_the_repository_are_refused(
    call: Any, hub: Hub, clone: Path, tmp_path: Path, part: str
) -> None:
    moved = tmp_path / "moved"
    shutil.move(clone / part, moved)
    (clone / part).symlink_to(moved)
    assert call({"operation": "fetch", "directory": "shop"}).status == 4
    (clone / part).unlink()
    shutil.move(moved, clone / part)
    assert call({"operation": "fetch", "directory": "shop"}).status == 0


def test_a_gitlink_file_is_refused(call: Any, hub: Hub, clone: Path, tmp_path: Path) -> None:
    shutil.move(clone / ".git", tmp_path / "elsewhere")
    (clone / ".git").write_text(f"gitdir: {tmp_path}/elsewhere\n")
    assert git("rev-parse", "--git-dir", cwd=clone) == f"{tmp_path}/elsewhere"
    ran = call({"operation": "fetch", "directory": "shop"})
    assert ran.status == 4
    assert "must be a folder" in ran.stderr


def test_a_clone_does_not_touch_what_is_there(call: Any, hub: Hub, workspace: Path) -> None:
    (workspace / "full").mkdir()
    (workspace / "full" / "file").write_text("mine")
    (workspace / "empty").mkdir()
    arguments = {"operation": "clone", "url": hub.url}
    assert call(arguments | {"directory": "full"}).status == 1
    assert (workspace / "full" / "file").read_text() == "mine"
    hub.password = "another"
    assert call(arguments | {"directory": "empty"}).status == 1
    assert list((workspace / "empty").iterdir()) == []
    hub.password = TOKEN
    assert call(arguments | {"directory": "empty"}).status == 0


def test_a_folder_that_is_no_repository_is_told(call: Any, workspace: Path, hub: Hub) -> None:
    (workspace / "plain").mkdir()
    ran = call({"operation": "fetch", "directory": "plain"})
    assert ran.status == 1
    assert "no git repository" in ran.stderr


# --- arguments and settings ---


WRONG: list[Any] = [
    {"operation": "gc"},
    {"operation": "fetch", "directory": "shop", "branch": "x"},
    {"operation": "push", "directory": "shop", "branch": "--exec=x"},
    {"operation": "push", "directory": "shop", "branch": "trunk:refs/heads/y"},
    {"operation": "push", "directory": "shop", "to": "a..b"},
    {"operation": "push", "directory": "shop", "to": "*"},
    {"operation": "push", "directory": "shop", "force": "yes"},
    {"operation": "fetch", "directory": "shop", "remote": "../x"},
    {"operation": "fetch", "directory": "shop", "remote": "--all"},
    {"operation": "fetch", "directory": "shop", "depth": 0},
    {"operation": "clone", "url": "{url}"},
    {"operation": "clone", "directory": "new"},
    {},
    [],
]


def test_wrong_arguments_are_told(call: Any, hub: Hub, clone: Path) -> None:
    before = len(hub.authorizations)
    for arguments in WRONG:
        if isinstance(arguments, dict) and arguments.get("url") == "{url}":
            arguments = arguments | {"url": hub.url}
        ran = call(arguments)
        assert ran.status == 2, (arguments, ran.everything)
        assert ran.stderr.startswith("git: ")
    assert len(hub.authorizations) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"REPOSITORY_TOKEN": ""}, "REPOSITORY_TOKEN is not set"),
        ({"REPOSITORY_TOKEN": TOKEN + "\n"}, "trailing newline"),
        ({"REPOSITORY_USERNAME": "a\nhost=evil"}, "REPOSITORY_USERNAME"),
        ({"REPOSITORY_HOSTS": ""}, "REPOSITORY_HOSTS is not set"),
        ({"REPOSITORY_HOSTS": "https://*.example.com"}, "entry 1"),
        ({"REPOSITORY_HOSTS": "https://a.example github.com"}, "entry 2"),
    ],
)
def test_settings_that_cannot_work_are_told(
    call: Any, hub: Hub, change: dict[str, str], words: str
) -> None:
    ran = call({"operation": "clone", "url": hub.url, "directory": "shop"}, **change)
    assert ran.status == 2
    assert words in ran.stderr
    assert not hub.authorizations
