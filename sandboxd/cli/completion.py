"""``sandboxctl completion``: scripts for bash, zsh and fish, made from the command tree.

Commands and options are written into the script. Names of agents, tools, sessions and variables
are asked for when they are needed, through the hidden command ``__complete``, which prints one a
line and nothing at all when no daemon answers.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from sandboxd.cli import parser as tree
from sandboxd.cli.parser import Commands, Parser, command
from sandboxd.errors import SandboxdError

__all__ = ["Node", "add", "nodes"]

#: Seconds that a prompt waits for a server far away.
_PATIENCE = 2.0

_KINDS = ("agents", "tools", "servers", "sessions", "variables", "approvals", "keys")


@dataclass(frozen=True)
class Node:
    """One command: its words, what may follow as (word, explanation), what its arguments are."""

    words: tuple[str, ...]
    commands: tuple[tuple[str, str], ...]
    options: tuple[tuple[str, str], ...]
    valued: tuple[str, ...]
    arguments: tuple[str, ...]  # a lookup per position, "" where there is none
    repeats: bool  # whether the last argument may be given again


def add(commands: Commands, name: str, line: str) -> None:
    if name == "completion":
        parser = command(
            commands,
            name,
            print_script,
            help=line,
            description="Print a script that completes commands, options and the names of agents, "
            "tools, sessions and variables.",
            examples=[
                ("source <(sandboxctl completion bash)", "for this shell; or in ~/.bashrc"),
                (
                    "sandboxctl completion zsh > /usr/local/share/zsh/site-functions/_sandboxctl",
                    "for every zsh",
                ),
                (
                    "sandboxctl completion fish > ~/.config/fish/completions/sandboxctl.fish",
                    "for fish",
                ),
            ],
        )
        parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="which shell")
        return
    parser = commands.add_parser(name)
    tree._add_shared(parser)
    parser.set_defaults(run=print_names, parser=parser)
    parser.add_argument("kind", choices=_KINDS)
    parser.add_argument("agent", nargs="?")


def print_script(args: argparse.Namespace) -> int:
    found = list(nodes(tree.build()))
    print({"bash": _bash, "zsh": _zsh, "fish": _fish}[args.shell](found), end="")
    return 0


def print_names(args: argparse.Namespace) -> int:
    from sandboxd.cli.daemon import connect

    try:
        with connect(args, timeout=_PATIENCE) as daemon:
            if args.kind == "agents":
                names = [row["slug"] for row in daemon.call("agents.list")["agents"]]
            elif args.kind == "tools":
                names = [row["name"] for row in daemon.call("tools.list")["tools"]]
            elif args.kind == "servers":
                names = [row["server"] for row in daemon.call("tools.pins")["servers"]]
            elif args.kind == "sessions":
                names = [row["id"] for row in daemon.call("session.list", all=False)["sessions"]]
            elif args.kind == "approvals":
                names = [row["id"] for row in daemon.call("approvals.list")["approvals"]]
            elif args.kind == "keys":
                names = [row["id"] for row in daemon.call("keys.list", all=False)["keys"]]
            elif args.agent:
                rows = daemon.call("env.list", agent=args.agent)["variables"]
                names = [row["name"] for row in rows]
            else:
                names = []
    except SandboxdError:
        return 0  # a prompt is no place for an error message
    for name in names:
        print(name)
    return 0


def nodes(parser: Parser, words: tuple[str, ...] = ()) -> Iterator[Node]:
    """The command tree, parents before children, without hidden commands."""
    commands: list[tuple[str, str]] = []
    options: list[tuple[str, str]] = []
    valued: list[str] = []
    arguments: list[str] = []
    repeats = False
    below: list[tuple[str, Parser]] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:
                commands.append((choice.dest, choice.help or ""))
                below.append((choice.dest, action.choices[choice.dest]))
        elif action.option_strings:
            options += [(option, action.help or "") for option in action.option_strings]
            if action.nargs != 0:
                valued += action.option_strings
        else:
            choices = " ".join(map(str, action.choices or ()))
            lookups = getattr(parser, "lookups", {})
            arguments.append(lookups.get(action.dest) or (f"={choices}" if choices else ""))
            repeats = action.nargs in ("+", "*")
    yield Node(words, tuple(commands), tuple(options), tuple(valued), tuple(arguments), repeats)
    for name, child in below:
        yield from nodes(child, (*words, name))


_BASH = r"""# bash completion of sandboxctl; made by: sandboxctl completion bash
__sandboxctl_lookup() {
    case $1 in
        "") ;;
        =*) printf '%s\n' ${1#=} ;;
        files|directories) compgen -f -- "$cur" ;;
        *) sandboxctl "${shared[@]}" __complete "$1" "$agent" 2>/dev/null ;;
    esac
}
__sandboxctl() {
    local cur=${COMP_WORDS[COMP_CWORD]} path= word agent= n=0 skip= wanted i key glued=
    local commands options valued arguments repeats
    local -a shared=() words=()
    local IFS=$' \t\n'
    COMPREPLY=()
    __sandboxctl_node ""
    # bash cuts a URL at its colons (COMP_WORDBREAKS): put it together again.
    for ((i = 0; i < COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        if [[ -n $glued || ( $i -gt 0 && $word =~ ^[:=]+$ ) ]]; then
            words[${#words[@]} - 1]+=$word
        else
            words+=("$word")
        fi
        [[ $word =~ ^[:=]+$ ]] && glued=x || glued=
    done
    for word in "${words[@]:1}"; do
        if [[ -n $skip ]]; then
            [[ $skip == shared ]] && shared+=("$word")
            skip=
        elif [[ $word == -- ]]; then
            return 0
        elif [[ $word == -* ]]; then
            if [[ $word == *=* && " @SHARED@ " == *" ${word%%=*} "* ]]; then
                shared+=("$word")
            elif [[ " @SHARED@ " == *" $word "* ]]; then
                shared+=("$word") skip=shared
            elif [[ " $valued " == *" $word "* ]]; then
                skip=other
            fi
        elif [[ " $commands " == *" $word "* ]]; then
            path="$path${path:+ }$word"
            __sandboxctl_node "$path"
        else
            (( n == 0 )) && agent=$word
            (( n++ ))
        fi
    done
    if [[ -n $skip ]]; then
        wanted=$(compgen -f -- "$cur")
    elif [[ $cur == -* ]]; then
        wanted=$options
    elif [[ -n $commands ]]; then
        wanted=$commands
    else
        local -a kinds
        IFS=';' read -ra kinds <<< "$arguments"
        if (( n >= ${#kinds[@]} )); then
            [[ -n $repeats ]] || return 0
            n=$(( ${#kinds[@]} - 1 ))
        fi
        (( n >= 0 )) || return 0
        wanted=$(__sandboxctl_lookup "${kinds[n]}")
    fi
    local IFS=$'\n'
    [[ $wanted == *$'\n'* ]] || wanted=${wanted// /$'\n'}
    COMPREPLY=($(compgen -W "$wanted" -- "$cur"))
}
__sandboxctl_node() {
    commands= options= valued= arguments= repeats=
    case $1 in
@CASES@
    esac
}
complete -o filenames -o nosort -F __sandboxctl sandboxctl 2>/dev/null ||
    complete -F __sandboxctl sandboxctl
"""

_ZSH = r"""#compdef sandboxctl
# zsh completion of sandboxctl; made by: sandboxctl completion zsh
__sandboxctl_node() {
    commands=() options=() valued= arguments= repeats=
    case $1 in
@CASES@
    esac
}
_sandboxctl() {
    local path_= word agent= skip= i n=0 valued arguments repeats
    local -a commands options kinds shared found
    __sandboxctl_node ""
    for (( i = 2; i < CURRENT; i++ )); do
        word=${words[i]}
        if [[ -n $skip ]]; then
            [[ $skip == shared ]] && shared+=("$word")
            skip=
        elif [[ $word == -- ]]; then
            return
        elif [[ $word == -*=* && " @SHARED@ " == *" ${word%%=*} "* ]]; then
            shared+=("$word")
        elif [[ $word == -* ]]; then
            if [[ " $valued " == *" $word "* ]]; then
                skip=other
                [[ " @SHARED@ " == *" $word "* ]] &&
                    { shared+=("$word"); skip=shared }
            fi
        elif (( ${commands[(I)$word:*]} )); then
            path_="$path_${path_:+ }$word"
            __sandboxctl_node "$path_"
        else
            (( n == 0 )) && agent=$word
            (( n += 1 ))
        fi
    done
    if [[ -n $skip ]]; then
        _files
    elif [[ ${words[CURRENT]} == -* ]]; then
        _describe -o option options
    elif (( ${#commands} )); then
        _describe command commands
    else
        kinds=("${(@s:;:)arguments}")
        [[ -n $arguments ]] || kinds=()
        if (( n >= ${#kinds} )); then
            [[ -n $repeats ]] || return 0
            (( n = ${#kinds} - 1 ))
        fi
        (( n >= 0 )) || return 0
        word=${kinds[n + 1]}
        case $word in
            "") ;;
            "="*) compadd -- ${=word#=} ;;
            files) _files ;;
            directories) _files -/ ;;
            *)
                found=(${(f)"$(sandboxctl $shared __complete $word $agent 2>/dev/null)"})
                compadd -- $found
                ;;
        esac
    fi
}
if [[ $funcstack[1] == _sandboxctl ]]; then
    _sandboxctl "$@"
else
    compdef _sandboxctl sandboxctl
fi
"""

_FISH = r"""# fish completion of sandboxctl; made by: sandboxctl completion fish
function __sandboxctl_node
    set -g __sandboxctl_commands
    set -g __sandboxctl_options
    set -g __sandboxctl_valued
    set -g __sandboxctl_arguments
    set -g __sandboxctl_repeats
    switch "$argv[1]"
@CASES@
    end
end
function __sandboxctl_complete
    set -l words (commandline -opc)
    set -l cur (commandline -ct)
    set -l path
    set -l shared
    set -l agent
    set -l skip
    set -l n 0
    __sandboxctl_node ""
    for word in $words[2..-1]
        if test -n "$skip"
            test "$skip" = shared; and set -a shared $word
            set skip
        else if test "$word" = --
            return
        else if string match -q -- '-*=*' $word
            contains -- (string replace -r '=.*' '' -- $word) @SHARED@; and set -a shared $word
        else if string match -q -- '-*' $word
            if contains -- $word $__sandboxctl_valued
                set skip other
                if contains -- $word @SHARED@
                    set -a shared $word
                    set skip shared
                end
            end
        else if contains -- $word (string replace -r '\t.*' '' -- $__sandboxctl_commands)
            set -a path $word
            __sandboxctl_node "$path"
        else
            test $n -eq 0; and set agent $word
            set n (math $n + 1)
        end
    end
    if test -n "$skip"
        __fish_complete_path $cur
    else if string match -q -- '-*' $cur
        printf '%s\n' $__sandboxctl_options
    else if test (count $__sandboxctl_commands) -gt 0
        printf '%s\n' $__sandboxctl_commands
    else
        set -l count (count $__sandboxctl_arguments)
        if test $n -ge $count
            test -n "$__sandboxctl_repeats"; or return 0
            set n (math $count - 1)
        end
        test $n -ge 0; or return 0
        set -l kind $__sandboxctl_arguments[(math $n + 1)]
        switch "$kind"
            case ''
            case '=*'
                string split ' ' -- (string sub -s 2 -- $kind)
            case files
                __fish_complete_path $cur
            case directories
                __fish_complete_directories $cur
            case '*'
                sandboxctl $shared __complete $kind $agent 2>/dev/null
        end
    end
end
complete -c sandboxctl -f -a '(__sandboxctl_complete)'
"""


def _bash(found: list[Node]) -> str:
    cases = [
        f"        {_quoted(' '.join(node.words))})\n"
        f"            commands={_quoted(' '.join(w for w, _ in node.commands))}\n"
        f"            options={_quoted(' '.join(w for w, _ in node.options))}\n"
        f"            valued={_quoted(' '.join(node.valued))}\n"
        f"            arguments={_quoted(';'.join(node.arguments))}\n"
        f"            repeats={'x' if node.repeats else ''} ;;"
        for node in found
    ]
    return _filled(_BASH, cases)


def _zsh(found: list[Node]) -> str:
    def pairs(words: tuple[tuple[str, str], ...]) -> str:
        return " ".join(_quoted(f"{w}:{what}") for w, what in words)

    cases = [
        f"        {_quoted(' '.join(node.words))})\n"
        f"            commands=({pairs(node.commands)})\n"
        f"            options=({pairs(node.options)})\n"
        f"            valued={_quoted(' '.join(node.valued))}\n"
        f"            arguments={_quoted(';'.join(node.arguments))}\n"
        f"            repeats={'x' if node.repeats else ''} ;;"
        for node in found
    ]
    return _filled(_ZSH, cases)


def _fish(found: list[Node]) -> str:
    def pairs(words: tuple[tuple[str, str], ...]) -> str:
        return " ".join(_fish_quoted(f"{w}\t{what}") for w, what in words)

    cases = [
        f"        case {_fish_quoted(' '.join(node.words))}\n"
        f"            set __sandboxctl_commands {pairs(node.commands)}\n"
        f"            set __sandboxctl_options {pairs(node.options)}\n"
        f"            set __sandboxctl_valued {' '.join(map(_fish_quoted, node.valued))}\n"
        f"            set __sandboxctl_arguments {' '.join(map(_fish_quoted, node.arguments))}\n"
        f"            set __sandboxctl_repeats {'x' if node.repeats else ''}"
        for node in found
    ]
    return _filled(_FISH, cases)


def _filled(script: str, cases: list[str]) -> str:
    shared = " ".join(option for option, _, _ in tree.SHARED)
    return script.replace("@CASES@", "\n".join(cases)).replace("@SHARED@", shared)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
