"""Clone, fetch and push with a token that neither the caller nor the repository ever sees.

Reads one JSON object on stdin (the arguments that tool.yaml describes) and writes one on stdout.
The first command line argument is the workspace, /workspace when absent. The environment holds
what the operator set for the agent:

``REPOSITORY_TOKEN``
    the password or access token;
``REPOSITORY_HOSTS``
    the origins it may go to, ``https://host[:port]`` separated by spaces or commas;
``REPOSITORY_USERNAME``
    optional, the user name that goes with it (default ``x-access-token``).

The repository belongs to the agent, and git runs programs that a repository's configuration names
(hooks, filters, fsmonitor, credential helpers, ssh and proxy commands ...). So git never reads
it here: it works in a private GIT_DIR whose configuration is ours, and which shares only
``objects``, ``refs`` and ``packed-refs`` with the repository (the layout of git's own
contrib/workdir/git-new-workdir). The token is in the environment of the one git process that
talks to the server, and an inline credential helper hands it to one origin only.

Exit status: 0 done, 1 git failed, 2 wrong arguments or settings, 4 refused. A message goes to
stderr and never holds the token.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

MAX_OUTPUT = 65_536  # of git's own messages
MAX_FILE = 1 << 20  # of a small file that is read from the repository

ARGUMENTS = {
    "clone": {"operation", "directory", "url", "branch", "depth"},
    "fetch": {"operation", "directory", "url", "remote", "depth"},
    "push": {"operation", "directory", "url", "remote", "branch", "to", "force"},
}

#: The private configuration. Nothing here comes from the repository.
SETTINGS = {
    "core.hooksPath": "/dev/null",
    "core.fsmonitor": "false",
    "core.untrackedCache": "false",
    "core.askPass": "",
    "core.logAllRefUpdates": "false",
    "core.packedGitLimit": "256m",  # the sandbox limits memory; git maps 1 GiB windows otherwise
    "core.packedGitWindowSize": "32m",
    "core.pager": "cat",
    "credential.helper": (
        '!f() { test "$1" = get || exit 0; p= h=; '
        'while IFS== read -r k v; do case "$k" in protocol) p=$v;; host) h=$v;; esac; done; '
        'test "$p://$h" = "$GIT_TOOL_ORIGIN" || exit 0; '
        'printf \'username=%s\\npassword=%s\\n\' "$GIT_TOOL_USERNAME" "$GIT_TOOL_TOKEN"; }; f'
    ),
    "fetch.recurseSubmodules": "false",
    "gc.auto": "0",
    "http.followRedirects": "false",  # a redirect could lead the token's request elsewhere
    "http.sslVerify": "true",
    "maintenance.auto": "false",
    "pack.threads": "2",
    "pack.windowMemory": "128m",
    "protocol.allow": "never",
    "push.recurseSubmodules": "no",
    "submodule.recurse": "false",
    "transfer.bundleURI": "false",
}

#: Repository format extensions that the private GIT_DIR understands.
OBJECT_FORMATS = ("sha1", "sha256")

_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_]([a-z0-9_-]{0,62}))*")
_PATH = re.compile(r"/[A-Za-z0-9._~/+%@:,=-]{1,1024}")
_HEAD = re.compile(rb"ref: refs/heads/([^\s\0]{1,200})\n?|[0-9a-f]{40,64}\n?")
_REMOTE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Stop(Exception):
    """Ends the program with a status, a message and a hint."""

    def __init__(self, status: int, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.hint = status, message, hint


def main(argv: list[str]) -> int:
    arguments = read_arguments()
    credential = Credential.from_environ()
    workspace = Path(argv[1] if len(argv) > 1 else "/workspace")
    operation = {"clone": clone, "fetch": fetch, "push": push}[arguments["operation"]]
    with private_directory() as private:
        result = operation(arguments, credential, workspace, private)
    text = json.dumps(result, ensure_ascii=False)
    sys.stdout.write(credential.hide(text) + "\n")
    return 0


# --- the three operations ---


def clone(
    arguments: dict[str, Any], credential: Credential, workspace: Path, private: Path
) -> dict[str, Any]:
    remote = Remote.parse(text(arguments, "url"), credential)
    names = directory_names(arguments, required=True)
    with made_directory(workspace, names) as target:
        repository = target / ".git"
        repository.mkdir()
        for folder in ("objects/info", "objects/pack", "refs/heads", "refs/tags"):
            (repository / folder).mkdir(parents=True)
        git = Git(private, repository, credential)
        listed = git.remote(remote, "ls-remote", "--symref", remote.url, "HEAD")
        default = re.search(r"^ref: refs/heads/(\S+)\tHEAD$", listed, re.MULTILINE)
        branch = optional_text(arguments, "branch") or (default[1] if default else "main")
        git.check_branch(branch)
        git.remote(
            remote,
            "fetch",
            *depth(arguments),
            "--no-write-fetch-head",
            "--no-recurse-submodules",
            remote.url,
            "+refs/heads/*:refs/remotes/origin/*",
        )
        tip = git.resolve(f"refs/remotes/origin/{branch}")
        if tip is None and "branch" in arguments:
            raise Stop(1, f"the remote has no branch {branch!a}")
        git.local("symbolic-ref", "HEAD", f"refs/heads/{branch}")
        if tip is not None:
            git.local("symbolic-ref", "refs/remotes/origin/HEAD", f"refs/remotes/origin/{branch}")
            git.local("update-ref", f"refs/heads/{branch}", tip)
            git.local("reset", "--hard", "--quiet", "--no-recurse-submodules", work_tree=target)
        git.give_back(("HEAD", "index", "shallow"))
        write_new(repository / "config", repository_config(remote.url, branch, git.object_format))
        return {
            "operation": "clone",
            "directory": "/".join(names),
            "branch": branch,
            "commit": tip,
            "messages": git.messages(),
        }


def fetch(
    arguments: dict[str, Any], credential: Credential, workspace: Path, private: Path
) -> dict[str, Any]:
    names = directory_names(arguments, required=False)
    git = Git(private, existing_repository(workspace, names), credential)
    name, remote = git.find_remote(arguments)
    before = git.refs(f"refs/remotes/{name}/")
    git.remote(
        remote,
        "fetch",
        *depth(arguments),
        "--no-write-fetch-head",
        "--no-recurse-submodules",
        remote.url,
        f"+refs/heads/*:refs/remotes/{name}/*",
    )
    git.give_back(("shallow",))
    after = git.refs(f"refs/remotes/{name}/")
    return {
        "operation": "fetch",
        "directory": "/".join(names),
        "remote": name,
        "updated": {ref: tip for ref, tip in after.items() if before.get(ref) != tip},
        "messages": git.messages(),
    }


def push(
    arguments: dict[str, Any], credential: Credential, workspace: Path, private: Path
) -> dict[str, Any]:
    names = directory_names(arguments, required=False)
    git = Git(private, existing_repository(workspace, names), credential)
    name, remote = git.find_remote(arguments)
    branch = optional_text(arguments, "branch") or git.current_branch()
    to = optional_text(arguments, "to") or branch
    git.check_branch(branch)
    git.check_branch(to)
    force = arguments.get("force", False)
    if not isinstance(force, bool):
        raise Stop(2, "force must be true or false")
    tip = git.resolve(f"refs/heads/{branch}")
    if tip is None:
        raise Stop(1, f"the repository has no branch {branch!a}")
    git.remote(
        remote,
        "push",
        "--porcelain",
        "--no-verify",
        "--recurse-submodules=no",
        remote.url,
        f"{'+' if force else ''}refs/heads/{branch}:refs/heads/{to}",
    )
    git.local("update-ref", f"refs/remotes/{name}/{to}", tip)
    return {
        "operation": "push",
        "directory": "/".join(names),
        "remote": name,
        "branch": branch,
        "to": to,
        "commit": tip,
        "messages": git.messages(),
    }


# --- git, kept away from every configuration but ours ---


class Git:
    """git in a private GIT_DIR beside a repository that is never asked for its configuration."""

    def __init__(self, private: Path, repository: Path, credential: Credential) -> None:
        self.private, self.repository, self.credential = private, repository, credential
        self._output: list[str] = []
        self._remotes: dict[str, str] = {}
        self.object_format = "sha1"
        home, directory = private / "home", private / "git"
        for folder in (home, directory, directory / "hooks", directory / "info"):
            folder.mkdir()
        self._base = {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": str(home),
            "XDG_CONFIG_HOME": str(home),
            "TMPDIR": str(private),
            "LC_ALL": "C.UTF-8",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_SYSTEM": "/dev/null",
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_ATTR_NOSYSTEM": "1",
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_NO_REPLACE_OBJECTS": "1",
            "GIT_PROTOCOL_FROM_USER": "0",
        }
        if authorities := os.environ.get("SSL_CERT_FILE"):
            self._base["GIT_SSL_CAINFO"] = authorities  # the operator's own, from the manifest
        self._read_config()
        (directory / "config").write_text(private_config(self.object_format))
        self.head = read_plain(repository / "HEAD") or b"ref: refs/heads/main\n"
        if not _HEAD.fullmatch(self.head):
            raise Stop(1, "the repository's HEAD is neither a branch nor a commit")
        (directory / "HEAD").write_bytes(self.head)
        if shallow := read_plain(repository / "shallow"):
            (directory / "shallow").write_bytes(shallow)
        for shared in ("objects", "refs", "packed-refs"):
            (directory / shared).symlink_to(repository / shared)
        self._base["GIT_DIR"] = str(directory)

    def remote(self, remote: Remote, *command: str) -> str:
        """A command that talks to the server: the only one that has the token."""
        extra = {
            "GIT_ALLOW_PROTOCOL": remote.scheme,
            "GIT_TOOL_ORIGIN": remote.origin,
            "GIT_TOOL_USERNAME": self.credential.username,
            "GIT_TOOL_TOKEN": self.credential.token,
        }
        return self._run(command, extra)

    def local(self, *command: str, work_tree: Path | None = None) -> str:
        extra = {"GIT_ALLOW_PROTOCOL": "none"}
        if work_tree is not None:
            extra["GIT_WORK_TREE"] = str(work_tree)
        return self._run(command, extra)

    def resolve(self, ref: str) -> str | None:
        """The object that ``ref`` names; None when there is no such ref."""
        return self.refs(ref).get(ref)

    def refs(self, prefix: str) -> dict[str, str]:
        listed = self.local("for-each-ref", "--format=%(refname) %(objectname)", prefix)
        return dict(line.split(" ", 1) for line in listed.splitlines())

    def check_branch(self, name: str) -> None:
        if name.startswith("-") or len(name) > 200:
            raise Stop(2, f"{name[:40]!a} is not a branch name")
        try:
            self.local("check-ref-format", f"refs/heads/{name}")
        except Stop:
            raise Stop(2, f"{name[:40]!a} is not a branch name") from None

    def current_branch(self) -> str:
        match = _HEAD.fullmatch(self.head)
        if not match or match[1] is None:
            raise Stop(2, "the repository is on no branch", "give the argument branch")
        return match[1].decode("utf-8", "replace")

    def find_remote(self, arguments: dict[str, Any]) -> tuple[str, Remote]:
        """The remote's name and its URL, checked like any other: the agent wrote it."""
        name = arguments.get("remote", "origin")
        if not isinstance(name, str) or not _REMOTE.fullmatch(name) or ".." in name:
            raise Stop(2, "remote is not the name of a remote")
        self.check_branch(name)
        url = optional_text(arguments, "url") or self._remotes.get(name)
        if url is None:
            raise Stop(1, f"the repository has no remote {name}", "give the argument url")
        return name, Remote.parse(url, self.credential)

    def give_back(self, names: tuple[str, ...]) -> None:
        """Copy files that git changed in the private GIT_DIR into the repository."""
        for name in names:
            source, target = self.private / "git" / name, self.repository / name
            if source.exists():
                replace_file(target, source)
            elif name == "shallow":
                target.unlink(missing_ok=True)

    def messages(self) -> str:
        return self.credential.hide("\n".join(self._output))[:MAX_OUTPUT]

    def _read_config(self) -> None:
        """What must be known of the repository's configuration: read as data, never obeyed."""
        data = read_plain(self.repository / "config")
        listed = self._run(
            ("config", "--file", "-", "--no-includes", "--null", "--list"),
            {"GIT_DIR": str(self.private / "none"), "GIT_ALLOW_PROTOCOL": "none"},
            stdin=data,
        )
        for item in listed.split("\0"):
            key, _, value = item.partition("\n")
            if key == "extensions.objectformat":
                if value not in OBJECT_FORMATS:
                    raise Stop(1, "the repository has an object format that is not known here")
                self.object_format = value
            elif key in ("extensions.partialclone", "extensions.refstorage"):
                if value != "files":
                    raise Stop(1, f"a repository with {key} is not possible here")
            elif match := re.fullmatch(r"remote\.(.+)\.url", key):
                self._remotes.setdefault(match[1], value)

    def _run(self, command: tuple[str, ...], extra: dict[str, str], stdin: bytes = b"") -> str:
        try:
            done = subprocess.run(
                ["git", *command],  # PATH is ours
                env=self._base | extra,
                cwd=self.private,
                input=stdin,
                capture_output=True,
                check=False,
            )
        except FileNotFoundError:
            raise Stop(1, "git is not installed on this host") from None
        words = done.stderr.decode("utf-8", "replace").replace(str(self.private), "")
        if done.returncode == 0:
            if words.strip():
                self._output.append(words.strip())
            return done.stdout.decode("utf-8", "replace")
        words += done.stdout.decode("utf-8", "replace") if command[0] == "push" else ""
        raise Stop(1, f"git {command[0]} failed", self.credential.hide(words.strip())[:4096])


@dataclass(frozen=True)
class Credential:
    """The token and where it may go. Its fields never reach a message."""

    token: str
    username: str
    origins: frozenset[str]

    @classmethod
    def from_environ(cls) -> Credential:
        token = os.environ.get("REPOSITORY_TOKEN", "")
        username = os.environ.get("REPOSITORY_USERNAME") or "x-access-token"
        if not token:
            raise Stop(2, "REPOSITORY_TOKEN is not set for this agent")
        for name, value in (("REPOSITORY_TOKEN", token), ("REPOSITORY_USERNAME", username)):
            if not re.fullmatch(r"[\x21-\x7e]+", value):
                raise Stop(
                    2,
                    f"{name} holds a blank or another character that git can't pass on",
                    "a trailing newline? set it again without",
                )
        origins = set()
        listed = os.environ.get("REPOSITORY_HOSTS", "").strip(" \t\r\n,")
        for number, entry in enumerate(re.split(r"[\s,]+", listed), 1):
            if not entry:
                raise Stop(2, "REPOSITORY_HOSTS is not set for this agent")
            try:
                origin, path = split_url(entry)
            except Stop:
                origin, path = "", "not an origin"
            if path not in ("", "/"):
                raise Stop(
                    2,
                    f"entry {number} of REPOSITORY_HOSTS is not an origin",
                    "write https://host or https://host:port, without path or wildcard",
                )
            origins.add(origin)
        return cls(token, username, frozenset(origins))

    def hide(self, words: str) -> str:
        """``words`` without the token: a server may well print what it was sent."""
        basic = base64.b64encode(f"{self.username}:{self.token}".encode()).decode()
        quoted = urllib.parse.quote(self.token, safe="")
        for value in sorted({basic, self.token, quoted}, key=len, reverse=True):
            words = words.replace(value, "[redacted:REPOSITORY_TOKEN]")
        return words


@dataclass(frozen=True)
class Remote:
    """A URL whose origin may have the token."""

    url: str
    scheme: str
    origin: str

    @classmethod
    def parse(cls, url: str, credential: Credential) -> Remote:
        origin, path = split_url(url)
        if origin not in credential.origins:
            raise Stop(
                4,
                f"{origin} is not an origin that the token may go to",
                "the operator lists origins as https://host[:port] in REPOSITORY_HOSTS",
            )
        if not _PATH.fullmatch(path) or {"..", "."} & set(urllib.parse.unquote(path).split("/")):
            raise Stop(2, "the url's path holds . or .. segments or unusual characters")
        return cls(origin + path, origin.partition(":")[0], origin)


def split_url(url: str) -> tuple[str, str]:
    """The normal form of the origin, and the path. Only http and https, nothing that git extends.

    ``ext::``, ``file://``, ``ssh://``, ``host:path`` and plain paths are transports that run
    programs or read files (git-remote-ext(1), gitremote-helpers(7)).
    """
    match = re.fullmatch(r"(https?)://([^/?#@\s\\]+)(/[^?#\s\\]*)?", url)
    if not match:
        raise Stop(
            4,
            "only https://host/path (or http://) can be used, without user name, ? or #",
            "other transports run programs or read files",
        )
    scheme, place, path = match[1], match[2].lower(), match[3] or ""
    name, colon, port = place.partition(":")
    if not _HOST.fullmatch(name) or (colon and not re.fullmatch(r"[1-9][0-9]{0,4}", port)):
        raise Stop(2, "the url's host is not a plain host name with an optional port")
    if port == {"http": "80", "https": "443"}[scheme]:
        colon = port = ""
    return f"{scheme}://{name}{colon}{port}", path


# --- files ---


def directory_names(arguments: dict[str, Any], *, required: bool) -> list[str]:
    """The parts of ``directory``: a plain path below the workspace."""
    given = optional_text(arguments, "directory")
    if given is None:
        if required:
            raise Stop(2, "directory must be given as text")
        return []
    given = given.removeprefix("/workspace/")
    names = given.split("/")
    for name in names:
        if name in ("", ".", "..") or name.lower() == ".git" or name.startswith("-"):
            raise Stop(4, "directory must be a plain path below the workspace")
        if not name.isprintable() or len(name.encode("utf-8", "replace")) > 255:
            raise Stop(2, "directory holds a character or a name that is not possible here")
    return names


def walk(workspace: Path, names: list[str]) -> Path:
    """The folder below ``workspace`` that is reached over real folders alone."""
    try:
        folder = os.open(workspace, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        raise Stop(1, "this agent has no workspace") from None
    try:
        for name in names:
            flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            deeper = os.open(name, flags, dir_fd=folder)
            os.close(folder)
            folder = deeper
    except FileNotFoundError:
        raise Stop(1, "there is no such directory in the workspace") from None
    except OSError:
        raise Stop(4, "the way to the directory leads over a symbolic link or a file") from None
    finally:
        os.close(folder)
    return workspace.joinpath(*names)


def existing_repository(workspace: Path, names: list[str]) -> Path:
    """The ``.git`` folder, with the folders that git will write to checked to be real ones."""
    target = walk(workspace, names)
    if (target / ".git").is_file():
        raise Stop(4, "a linked worktree or submodule is not possible here, .git must be a folder")
    for part in ("objects", "refs"):
        try:
            folder = walk(target, [".git", part])
        except Stop as stop:
            if stop.status == 4:
                raise Stop(4, f"the repository's {part} is a symbolic link or no folder") from None
            raise Stop(1, "there is no git repository in that directory") from None
        for entry in entries(folder, deep=part == "refs"):
            if entry.is_symlink():
                raise Stop(4, f"the repository's {part} holds a symbolic link")
    return target / ".git"


def entries(folder: Path, *, deep: bool) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as found:
        for entry in found:
            yield entry
            if deep and entry.is_dir(follow_symlinks=False):
                yield from entries(Path(entry.path), deep=True)


@contextlib.contextmanager
def made_directory(workspace: Path, names: list[str]) -> Iterator[Path]:
    """A new folder, or an empty one that is there; what was made is removed when the body fails."""
    parent = workspace
    for index in range(1, len(names)):
        with contextlib.suppress(FileExistsError):
            workspace.joinpath(*names[:index]).mkdir()
        parent = walk(workspace, names[:index])
    target = parent / names[-1]
    made = True
    try:
        target.mkdir()
    except FileExistsError:
        made = False
        walk(workspace, names)
        if any(target.iterdir()):
            raise Stop(1, "the directory is there already and is not empty") from None
    try:
        yield target
    except BaseException:
        for entry in list(target.iterdir()):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
        if made:
            with contextlib.suppress(OSError):
                target.rmdir()
        raise


@contextlib.contextmanager
def private_directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="git-") as name:
        yield Path(name)


def read_plain(path: Path) -> bytes:
    """A small regular file of the repository; empty when it isn't there."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    except OSError:
        raise Stop(4, f"the repository's {path.name} is a symbolic link") from None
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise Stop(4, f"the repository's {path.name} is no regular file")
        data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise Stop(1, f"the repository's {path.name} is too large")
    return data


def write_new(path: Path, words: str) -> None:
    with open(path, "x", encoding="utf-8") as file:
        file.write(words)


def replace_file(target: Path, source: Path) -> None:
    """A copy of ``source`` in the place of ``target``, whatever stood there."""
    fresh = target.with_name(f"{target.name}.{os.getpid()}.new")
    with open(source, "rb") as reading, open(fresh, "xb") as writing:
        shutil.copyfileobj(reading, writing)
    fresh.replace(target)


def private_config(object_format: str) -> str:
    lines = [core_section(object_format)]
    for key, value in SETTINGS.items():
        section, name = key.split(".")
        quoted = value.replace("\\", "\\\\").replace('"', '\\"')
        lines.append(f'[{section}]\n\t{name} = "{quoted}"\n')
    for scheme in ("http", "https"):
        lines.append(f'[protocol "{scheme}"]\n\tallow = always\n')
    return "".join(lines)


def repository_config(url: str, branch: str, object_format: str) -> str:
    """What a clone leaves behind: where it came from, without a credential."""
    return core_section(object_format) + (
        f'[remote "origin"]\n\turl = {url}\n\tfetch = +refs/heads/*:refs/remotes/origin/*\n'
        f'[branch "{branch}"]\n\tremote = origin\n\tmerge = refs/heads/{branch}\n'
    )


def core_section(object_format: str) -> str:
    if object_format == "sha1":
        return "[core]\n\trepositoryformatversion = 0\n\tfilemode = true\n\tbare = false\n"
    return (
        "[core]\n\trepositoryformatversion = 1\n\tfilemode = true\n\tbare = false\n"
        f"[extensions]\n\tobjectformat = {object_format}\n"
    )


# --- arguments ---


def read_arguments() -> dict[str, Any]:
    try:
        arguments = json.load(sys.stdin)
    except (ValueError, RecursionError):
        raise Stop(2, "stdin is not one JSON object") from None
    if not isinstance(arguments, dict):
        raise Stop(2, "stdin is not one JSON object")
    known = ARGUMENTS.get(str(arguments.get("operation")))
    if known is None:
        raise Stop(2, "operation must be clone, fetch or push")
    if extra := sorted(set(arguments) - known):
        raise Stop(2, f"{arguments['operation']} takes no argument {extra[0][:40]!a}")
    return arguments


def text(arguments: dict[str, Any], name: str) -> str:
    value = arguments.get(name)
    if not isinstance(value, str) or not value or "\0" in value:
        raise Stop(2, f"{name} must be given as text")
    return value


def optional_text(arguments: dict[str, Any], name: str) -> str | None:
    return text(arguments, name) if name in arguments else None


def depth(arguments: dict[str, Any]) -> tuple[str, ...]:
    value = arguments.get("depth")
    if value is None:
        return ()
    if type(value) is not int or not 1 <= value <= 1_000_000:
        raise Stop(2, "depth must be a whole number from 1 to 1,000,000")
    return (f"--depth={value}",)


def end(status: int, message: str, hint: str = "") -> NoReturn:
    sys.stderr.write(f"git: {message}\n" + (f"hint: {hint}\n" if hint else ""))
    sys.exit(status)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv))
    except Stop as stop:
        end(stop.status, stop.message, stop.hint)
    except Exception as error:  # noqa: BLE001  # a traceback could show the token
        end(1, f"unexpected {type(error).__name__}")
