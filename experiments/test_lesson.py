"""The lesson, executed from a fresh kernel in small settings, and what it promises.

    python -m pytest -q experiments/test_lesson.py

Needs nbclient, ipykernel and matplotlib (`make lesson` installs them); skipped without.
"""

import ast
import os
import re
import tempfile
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

HERE = Path(__file__).resolve().parent
EXERCISES = range(1, 9)
WRONG = {  # one wrong answer for each exercise
    1: "def kl_gradient(p, q): return p - q",
    2: "sae_8, tuned_8 = sae, tuned",
    3: "kl_only = tuned",
    4: "reverse_kl = kl_divergence",
    5: "batch_topk, threshold = keep_largest, 0.0",
    6: "def matryoshka_mse(sae, x, sizes): return (x - sae(x)[0]).pow(2).sum(-1).mean()",
    7: "fvu_counted = fvu_left_out = by_tuned['fvu']",
    8: "lora, n_trained = tuned, sum(p.numel() for p in tuned.parameters())",
}


def read(name):
    return nbformat.read(HERE / name, as_version=4)


def tagged(notebook, tag):
    """The one cell with a tag."""
    (cell,) = [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]
    return cell


def code_cells(notebook, *kinds):
    """Code cells, all or those with a tag among `kinds`."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [c for c in cells if not kinds or set(kinds) & set(c.metadata.get("tags", []))]


def printed(cell):
    return "".join(out.text for out in cell.outputs if out.output_type == "stream")


def code_lines(source):
    """Lines that are neither empty, nor comment, nor docstring."""
    skipped = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped |= set(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(bool(re.match(r"\s*[^\s#]", line)) and i not in skipped for i, line in lines)


@pytest.fixture(scope="module")
def executed():
    """The lesson, executed; after each exercise's check its answer, the check again, a wrong
    answer, the check again."""
    lesson, answers = read("lesson.ipynb"), read("lesson_answers.ipynb")
    for n in EXERCISES:
        check = tagged(lesson, f"check-{n}")
        after = lesson.cells.index(check) + 1
        new = nbformat.v4.new_code_cell
        again = [
            new(check.source, metadata={"tags": [tag]}) for tag in (f"right-{n}", f"wrong-{n}")
        ]
        answer = new(tagged(answers, f"exercise-{n}").source)
        lesson.cells[after:after] = [answer, again[0], new(WRONG[n]), again[1]]
    before = os.environ.get("SAEFT_LESSON")
    os.environ["SAEFT_LESSON"] = "small"
    try:
        resources = {"metadata": {"path": str(HERE)}}
        client = nbclient.NotebookClient(lesson, timeout=900, resources=resources)
        client.kernel_name = "python3"
        return client.execute()
    finally:
        del os.environ["SAEFT_LESSON"]
        if before is not None:
            os.environ["SAEFT_LESSON"] = before


def test_lesson_figures_are_saefts(executed):
    assert printed(tagged(executed, "last")).endswith("The lesson's figures are saeft's.\n")


@pytest.mark.parametrize("n", EXERCISES)
def test_checks_tell_right_from_wrong(executed, n):
    empty, right, wrong = (
        printed(tagged(executed, f"{kind}-{n}")) for kind in ("check", "right", "wrong")
    )
    assert f"Exercise {n}: not done yet" in empty
    assert f"Exercise {n}: right" in right
    assert f"Exercise {n}: wrong" in wrong and "right." not in wrong


def test_committed_with_its_outputs():
    lesson = read("lesson.ipynb")
    assert (HERE / "lesson.ipynb").stat().st_size < 700_000
    assert printed(tagged(lesson, "last")).endswith("The lesson's figures are saeft's.\n")
    counts = [cell.execution_count for cell in code_cells(lesson)]
    assert counts == list(range(1, len(counts) + 1)), "not executed from top to bottom"
    pictures = [out for cell in code_cells(lesson, "picture") for out in cell.outputs]
    assert sum("image/png" in out.get("data", {}) for out in pictures) >= 12
    for n in EXERCISES:
        assert code_lines(tagged(lesson, f"exercise-{n}").source) == 0
        assert "not done yet" in printed(tagged(lesson, f"check-{n}"))
        assert f"Exercise {n}: right" in printed(
            tagged(read("lesson_answers.ipynb"), f"exercise-{n}")
        )


def test_method_is_at_most_150_lines():
    assert (
        sum(code_lines(cell.source) for cell in code_cells(read("lesson.ipynb"), "method")) <= 150
    )


@pytest.mark.parametrize("name", ["lesson.ipynb", "lesson_answers.ipynb"])
def test_no_local_paths_and_no_errors(name):
    notebook = read(name)
    outputs = [out for cell in code_cells(notebook) for out in cell.outputs]
    assert not [out for out in outputs if out.output_type == "error" or out.get("name") == "stderr"]
    text = "".join(printed(cell) + cell.source for cell in code_cells(notebook))
    for path in (tempfile.gettempdir(), str(Path.home()), str(HERE.parent)):
        assert f"{path}/" not in text
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
