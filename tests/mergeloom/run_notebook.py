"""Runs the code cells of a notebook one after the other: `python run_notebook.py NOTEBOOK`. Prints what each cell
gives.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any


def run(notebook: Path) -> dict[str, Any]:
    """Execute every code cell in one namespace, in the current directory, and return the namespace."""
    sys.path.insert(0, "")  # as a kernel has it
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            tree = ast.parse("".join(cell["source"]), f"{notebook.name}, cell {number}")
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, f"{notebook.name}, cell {number}", "exec"), names)
            if isinstance(last, ast.Expr):
                print(eval(compile(ast.Expression(last.value), f"{notebook.name}, cell {number}", "eval"), names))
    return names


if __name__ == "__main__":
    run(Path(sys.argv[1]))
