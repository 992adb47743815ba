"""Shell completion by click's own mechanism, with the settings of `train` and without the import of any command."""

from __future__ import annotations

import click
from click.shell_completion import BashComplete, add_completion_class, shell_complete

VARIABLE = "_MINDPRINT_COMPLETE"
"""Set by the shell. `bash_source` and its like print the script to load, `bash_complete` answers the Tab key."""


class Bash(BashComplete):
    """Bash puts a space behind each completion, also behind `sft.learning_rate=`, which wants a value."""

    source_template = BashComplete.source_template.replace(
        "    return 0", '    if [[ "${COMPREPLY[0]}" == *= ]]; then compopt -o nospace; fi\n\n    return 0'
    )

    @staticmethod
    def _check_version() -> None:
        """Leave out the start of a shell that asks for its version: an old one fails by itself."""


def complete(group: click.Group, program: str, instruction: str) -> int:
    """Print the completion script, or the completions that the shell asks for."""
    add_completion_class(Bash, "bash")
    return shell_complete(group, {}, program, VARIABLE, instruction)
