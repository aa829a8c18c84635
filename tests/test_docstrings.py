"""Docstrings of public functions begin with what they do."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
# what a docstring begins with; add the verb of yours
VERBS = frozenset(
    """
    Add Append Apply Ask Average Begin Blur Bring Build Call Carry Change Check Choose Close
    Collect Compile Compute Contrast Convert Copy Count Create Cut Delete Divide Do Download
    Draw End Enter Estimate Evaluate Exchange Exit Fetch Fill Find Fix Follow Forget Freeze Give
    Go Guard Have Hold Ignore Import Increase Initialise Join Keep Label Leave Lend Let Load Log
    Look Make Mark Measure Mend Mix Move Name Normalise Note Number Open Order Pad Pass Place
    Predict Prefer Prepare Print Pull Push Put Raise Rank Read Receive Recompute Record Refuse
    Register Remember Remove Replace Replay Report Reset Resume Return Run Save Say Search Seed
    Select Send Serve Set Show Sort Start Stop Store Submit Sum Switch Take Teach Tell Train Try
    Turn Undo Unpack Update Upload Use Validate Visit Wait Warn Wrap Write Yield
    """.split()  # noqa: SIM905
)


def functions(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the place and docstring of every public function and method of a file."""
    tree = ast.parse(path.read_text("utf-8"))
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]
    for owner in (tree, *classes):
        for node in owner.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", ast.get_docstring(node) or ""


def test_docstrings_begin_with_a_verb() -> None:
    files = [*sorted((ROOT / "ctt").rglob("*.py")), *sorted((ROOT / "benchmarks").glob("*.py"))]
    found = [f for path in files for f in functions(path)]
    assert len(found) > 500
    wrong = [
        f"{place} {text.splitlines()[0]}"
        for place, text in found
        if text and text.split()[0].rstrip(".,:") not in VERBS
    ]
    assert wrong == []
