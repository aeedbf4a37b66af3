"""`python -m controller completion SHELL`: what may come next, from the parser itself.

The script that a shell reads asks this program at every TAB, so it never goes stale. Where there is
nothing to say, the shell completes file names.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

SHELLS = ("bash", "zsh", "fish")
SCRIPTS = {
    "bash": """\
# source <(python -m controller completion bash)
_rlaifv_controller() {
    [ "$COMP_CWORD" -ge 3 ] && [ "${COMP_WORDS[*]:1:2}" = "-m controller" ] || return
    local words=("${COMP_WORDS[@]:3:COMP_CWORD-2}")
    mapfile -t COMPREPLY < <("${COMP_WORDS[0]}" -m controller completion bash --words "${words[@]}" 2>/dev/null)
}
complete -o bashdefault -o default -F _rlaifv_controller python python3
""",
    "zsh": """\
# source <(python -m controller completion zsh)     after compinit
_rlaifv_controller() {
    local -a found
    if (( CURRENT > 3 )) && [[ "${words[2]} ${words[3]}" == "-m controller" ]]; then
        found=(${(f)"$("${words[1]}" -m controller completion zsh --words "${(@)words[4,CURRENT]}" 2>/dev/null)"})
    fi
    if (( ${#found} )); then compadd -a found; else _files; fi
}
compdef _rlaifv_controller python python3
""",
    "fish": """\
# python -m controller completion fish | source
function __rlaifv_controller
    set -l words (commandline -opc) (commandline -ct)
    $words[1] -m controller completion fish --words $words[4..-1] 2>/dev/null
end
for program in python python3
    complete -c $program -n 'test (string join -- " " (commandline -opc)[2..3]) = "-m controller"' \\
        -a '(__rlaifv_controller)'
end
""",
}


def candidates(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """What may stand for the last of `words`, sorted; none where a file's name is expected."""
    *before, last = words or [""]
    place = _Place(parser)
    for word in before:
        place.take(word)
    return sorted(word for word in place.expected(last) if word.startswith(last))


class _Place:
    """How far a command line has been read."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._root = "runs"
        self._enter(parser)

    def _enter(self, parser: argparse.ArgumentParser) -> None:
        self._flags = {name: action for action in parser._actions for name in action.option_strings}
        self._positional = [action for action in parser._actions if not action.option_strings]
        self._pending: argparse.Action | None = None

    def take(self, word: str) -> None:
        """Reads a complete word."""
        if self._pending is not None:
            if self._pending.dest == "root":
                self._root = word
            self._pending = None
        elif word.startswith("-"):
            action = self._flags.get(word)
            self._pending = action if action is not None and action.nargs != 0 else None
        elif self._positional:
            action = self._positional[0]
            if isinstance(action, argparse._SubParsersAction):
                if word in action.choices:
                    self._enter(action.choices[word])
            elif action.nargs != "*":
                self._positional.pop(0)

    def expected(self, last: str) -> Iterator[str]:
        """What may come; flags only when one has been begun."""
        if self._pending is not None:
            yield from self._values(self._pending)
        elif last.startswith("-"):
            yield from self._flags
        elif self._positional:
            yield from self._values(self._positional[0])

    def _values(self, action: argparse.Action) -> Iterator[str]:
        if action.choices is not None:
            yield from map(str, action.choices)
        elif action.dest in ("run", "names"):
            for config in Path(self._root).glob("*/config.json"):
                yield config.parent.name
        elif action.dest in ("stage", "start"):
            from rlaifv.pipeline import STAGES

            yield from STAGES
        elif action.dest == "what":
            from rlaifv.pipeline import ARTIFACTS

            yield from ("config", "table", "choice", "pair", *ARTIFACTS)
        elif action.dest == "recipe":
            from rlaifv.recipes import RECIPES

            yield from RECIPES
