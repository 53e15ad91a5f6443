"""Check the subject of a commit message: at most 72 characters, no full stop, a blank line below.

The pre-commit hook calls it with the file of the message. Without an argument it checks the newest commit.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LONGEST = 72
GENERATED = ("Merge ", "Revert ", "fixup! ", "squash! ")
"""How subjects begin that git writes by itself."""


def complaints(message: str) -> list[str]:
    """Return what is wrong with a commit message; an empty list if nothing is."""
    lines = [line for line in message.splitlines() if not line.startswith("#")]
    subject = lines[0] if lines else ""
    if subject.startswith(GENERATED):
        return []
    wrong = []
    if not subject.strip():
        wrong.append("the subject is empty; say in one line what the commit does")
    if len(subject) > LONGEST:
        wrong.append(f"the subject has {len(subject)} characters; shorten it to {LONGEST} and say the rest in the body")
    if subject.endswith("."):
        wrong.append("the subject ends with a full stop; leave it out")
    if len(lines) > 1 and lines[1].strip():
        wrong.append("the second line is not blank; git takes it for a part of the subject")
    return wrong


def main(arguments: list[str]) -> int:
    """Print what is wrong; return 1 if something is."""
    if arguments:
        message = Path(arguments[0]).read_text(encoding="utf-8")
    else:
        command = ["git", "log", "-1", "--format=%B"]
        message = subprocess.run(command, capture_output=True, text=True, check=True).stdout.rstrip("\n")
    wrong = complaints(message)
    for line in wrong:
        print(f"commit message: {line}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
