"""The script can be read in one go."""

import ast
import statistics

from conftest import ROOT

LINES = 1150
CAPABILITIES = ["completions kept", "conversations", "several machines"]
"""What the script gained since: ten lines each."""
SOURCE = (ROOT / "mlx-grpo.py").read_text()


def functions():
    """Name -> lines of each function, with its docstring."""
    found = [n for n in ast.walk(ast.parse(SOURCE)) if isinstance(n, ast.FunctionDef)]
    return {node.name: node.end_lineno - node.lineno + 1 for node in found}


def test_it_is_no_longer_than_it_was():
    assert len(SOURCE.splitlines()) <= LINES + 10 * len(CAPABILITIES)


def test_its_functions_are_short():
    lengths = functions()
    assert len(lengths) > 60
    assert statistics.median(lengths.values()) <= 10
    assert max(lengths.values()) <= 45, max(lengths, key=lengths.get)
