"""What the completion of each shell is made of; @CASES@ and the like are filled in.

Words that come from elsewhere (names of files, of a server's tools) are compared and inserted, and
never expanded: an agent chooses names in its workspace, and whoever looks there presses Tab.
"""

from __future__ import annotations

__all__ = ["BASH", "FISH", "ZSH"]

#: bash and zsh read this alike.
_KIND = r"""# Finds the kind of the value that option $1 takes; false if it takes none.
__sandboxctl_kind() {
    local all=";$valued;@SHARED_KINDS@;"
    [[ $all == *";$1 "* ]] || return
    kind=${all#*";$1 "}
    kind=${kind%%;*}
}"""

BASH = r"""# bash completion of sandboxctl; made by: sandboxctl completion bash
__sandboxctl_lookup() {
    case $1 in
        "") ;;
        =*) printf '%s\n' ${1#=} ;;
        files) compgen -f -- "$cur" ;;
        directories) compgen -d -- "$cur" ;;
        places)
            [[ $cur == s-*:* ]] && return
            sandboxctl "${shared[@]}" __complete sessions 2>/dev/null |
                while read -r word; do printf '%s:\n' "$word"; done
            compgen -f -- "$cur"
            ;;
        *) sandboxctl "${shared[@]}" __complete "$1" "$agent" 2>/dev/null ;;
    esac
}
@KIND@
__sandboxctl() {
    local cur=${COMP_WORDS[COMP_CWORD]} path= word agent= n=0 skip= wanted i
    local kind= glued= whole prefix=
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
    whole=$cur
    if [[ -n $glued || $cur =~ ^[:=]+$ ]]; then
        i=$(( ${#words[@]} - 1 ))
        whole=${words[i]}$cur
        unset "words[i]"
        [[ $cur =~ ^[:=]+$ ]] && cur=
    fi
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
                __sandboxctl_kind "$word"
            elif __sandboxctl_kind "$word"; then
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
    if [[ -z $skip && $whole == -*=* ]] && __sandboxctl_kind "${whole%%=*}"; then
        skip=other
        [[ $cur == "$whole" ]] && prefix=${whole%%=*}= cur=${whole#*=}
        whole=${whole#*=}
    fi
    # What comes before a colon is not ours to replace, and names have none.
    [[ $whole == "$cur" ]] || return 0
    if [[ -n $skip ]]; then
        wanted=$(__sandboxctl_lookup "$kind")
    elif [[ $cur == -* ]]; then
        wanted=${options// /$'\n'}
    elif [[ -n $commands ]]; then
        wanted=${commands// /$'\n'}
    else
        local -a kinds
        IFS=';' read -ra kinds <<< "$arguments"
        if (( n >= ${#kinds[@]} )); then
            [[ -n $repeats ]] || return 0
            n=$(( ${#kinds[@]} - 1 ))
        fi
        (( n >= 0 )) || return 0
        kind=${kinds[n]}
        wanted=$(__sandboxctl_lookup "$kind")
    fi
    # Not compgen -W: that expands what it is given, and a file's name may be $(a command).
    while IFS= read -r word; do
        [[ -n $word && $word == "$cur"* ]] && COMPREPLY+=("$prefix$word")
    done <<< "$wanted"
    if [[ $kind == places && ${COMPREPLY[0]-} =~ ^s-[0-9a-f]+:$ ]]; then
        # As files, sessions would get their colon quoted; so quote the files here.
        compopt +o filenames -o nospace 2>/dev/null
        for i in "${!COMPREPLY[@]}"; do
            [[ ${COMPREPLY[i]} =~ ^s-[0-9a-f]+:$ ]] || printf -v "COMPREPLY[i]" %q "${COMPREPLY[i]}"
        done
    fi
    return 0
}
__sandboxctl_node() {
    commands= options= valued= arguments= repeats=
    case $1 in
@CASES@
    esac
}
complete -o filenames -o nosort -F __sandboxctl sandboxctl 2>/dev/null ||
    complete -F __sandboxctl sandboxctl
""".replace("@KIND@", _KIND)

ZSH = r"""#compdef sandboxctl
# zsh completion of sandboxctl; made by: sandboxctl completion zsh
__sandboxctl_node() {
    commands=() options=() valued= arguments= repeats=
    case $1 in
@CASES@
    esac
}
@KIND@
__sandboxctl_value() {
    case $kind in
        "") ;;
        "="*) compadd -- ${=kind#=} ;;
        files) _files ;;
        directories) _files -/ ;;
        places)
            [[ $PREFIX == s-*:* ]] && return
            found=(${(f)"$(sandboxctl $shared __complete sessions 2>/dev/null)"})
            compadd -S '' -- ${^found}:
            _files
            ;;
        *)
            found=(${(f)"$(sandboxctl $shared __complete $kind $agent 2>/dev/null)"})
            compadd -- $found
            ;;
    esac
}
_sandboxctl() {
    local path_= word agent= skip= kind= i n=0 valued arguments repeats
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
            if __sandboxctl_kind "$word"; then
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
    word=${words[CURRENT]}
    if [[ -n $skip ]]; then
        __sandboxctl_value
    elif [[ $word == -*=* ]] && __sandboxctl_kind "${word%%=*}"; then
        compset -P 1 '*='
        __sandboxctl_value
    elif [[ $word == -* ]]; then
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
        kind=${kinds[n + 1]}
        __sandboxctl_value
    fi
}
if [[ $funcstack[1] == _sandboxctl ]]; then
    _sandboxctl "$@"
else
    compdef _sandboxctl sandboxctl
fi
""".replace("@KIND@", _KIND)

FISH = r"""# fish completion of sandboxctl; made by: sandboxctl completion fish
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
function __sandboxctl_kind -d 'The kind of the value that an option takes'
    for pair in $__sandboxctl_valued @SHARED_KINDS@
        if string match -q -- "$argv[1] *" $pair
            string replace -- "$argv[1] " '' $pair
            return 0
        end
    end
    return 1
end
function __sandboxctl_value -a kind cur agent
    set -l shared $argv[4..-1]
    switch "$kind"
        case ''
        case '=*'
            string split ' ' -- (string sub -s 2 -- $kind)
        case files
            __fish_complete_path $cur
        case directories
            __fish_complete_directories $cur
        case places
            string match -q -- 's-*:*' $cur; and return
            for id in (sandboxctl $shared __complete sessions 2>/dev/null)
                printf '%s:\tsession\n' $id
            end
            __fish_complete_path $cur
        case '*'
            sandboxctl $shared __complete $kind $agent 2>/dev/null
    end
end
function __sandboxctl_complete
    set -l words (commandline -opc)
    set -l cur (commandline -ct)
    set -l path
    set -l shared
    set -l agent
    set -l skip
    set -l kind
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
            if set kind (__sandboxctl_kind $word)
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
    set -l option (string replace -r '=.*' '' -- $cur)
    if test -n "$skip"
        __sandboxctl_value "$kind" "$cur" "$agent" $shared
    else if string match -q -- '-*=*' $cur; and set kind (__sandboxctl_kind $option)
        set cur (string replace -r '^[^=]*=' '' -- $cur)
        for value in (__sandboxctl_value "$kind" "$cur" "$agent" $shared)
            printf '%s\n' "$option=$value"
        end
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
        set kind $__sandboxctl_arguments[(math $n + 1)]
        __sandboxctl_value "$kind" "$cur" "$agent" $shared
    end
end
complete -c sandboxctl -f -a '(__sandboxctl_complete)'
"""
