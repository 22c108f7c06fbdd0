"""docs/quickstart.ipynb: what is stored of it is whole and names no machine, and it runs from nothing to figures."""

import base64
import json
import re
import sys

import pytest
from helpers import ROOT

PAGE = ROOT / "docs/quickstart.ipynb"
BOOK = json.loads(PAGE.read_text(encoding="utf-8"))
CODE = [cell for cell in BOOK["cells"] if cell["cell_type"] == "code"]
OUTPUTS = [output for cell in CODE for output in cell["outputs"]]
# Run after the notebook's own cells.
FIGURES = """
print(json.dumps({"report": report["clip"], "aurocs": aurocs, "read_out": read_out, "answers": list(answers)}))
"""


def texts():
    """Every text in the notebook, and pictures as what is in them."""
    yield from ("".join(cell["source"]) for cell in BOOK["cells"])
    for output in OUTPUTS:
        if output["output_type"] == "stream":
            yield "".join(output["text"])
        for kind, content in output.get("data", {}).items():
            content = content if isinstance(content, str) else "".join(content)
            yield base64.b64decode(content).decode("latin-1") if kind.startswith("image/") else content


def test_it_is_a_notebook():
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.reads(PAGE.read_text(encoding="utf-8"), as_version=nbformat.NO_CONVERT))
    assert BOOK["metadata"]["kernelspec"]["name"] == "python3"
    assert PAGE.stat().st_size < 600_000


def test_every_cell_was_run_in_order_and_without_an_error():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    assert {output["output_type"] for output in OUTPUTS} <= {"stream", "display_data", "execute_result"}
    assert {output["name"] for output in OUTPUTS if output["output_type"] == "stream"} == {"stdout"}


def test_it_names_no_machine_and_no_time():
    absolute = re.compile(
        r"(?<![\w.:/<])/(?:bin|data|dev|etc|home|media|mnt|opt|private|root|srv|tmp|usr|Users|var|work)\b"
    )
    for text in texts():
        # Of a sound's bytes, in base64, any letters may come.
        text = re.sub(r"base64,[\w+/=]+", "", text)
        assert not absolute.search(text) and not re.search(r"\b[A-Z]:\\", text), text[:200]
        assert not re.search(r"\b\d{4}-\d\d-\d\d\b|\b\d\d:\d\d:\d\d\b|it/s\]", text), text[:200]
    assert not {key for cell in BOOK["cells"] for key in cell["metadata"]} & {"execution", "ExecuteTime"}


def test_pictures_have_a_text_for_those_who_cannot_see_them():
    pictures = [output for output in OUTPUTS if "image/png" in output.get("data", {})]
    assert len(pictures) == 3
    for output in pictures:
        assert len(output["metadata"]["image/png"]["alt"]) > 40


def test_links_lead_somewhere():
    text = "\n".join("".join(cell["source"]) for cell in BOOK["cells"] if cell["cell_type"] == "markdown")
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (PAGE.parent / target).exists(), target


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_runs_from_nothing_to_its_figures(tmp_path, monkeypatch):
    """With half the epochs, in a kernel of this very Python."""
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from nbformat import reads
    from nbformat.v4 import new_code_cell

    class ThisPython(AsyncKernelManager):
        @property
        def kernel_spec(self):
            return KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"])

    folders = {"ACCENT_PLUGIN_CORPUS": "corpus", "ACCENT_PLUGIN_WORK": "work"}
    folders |= {"JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython"}
    for name, folder in folders.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setenv("ACCENT_PLUGIN_EPOCHS", "2")
    book = reads(PAGE.read_text(encoding="utf-8"), as_version=4)
    book.cells.append(new_code_cell(FIGURES))
    client = nbclient.NotebookClient(
        book, km=ThisPython(), timeout=1500, resources={"metadata": {"path": str(ROOT / "docs")}}
    )
    client.execute()
    assert (tmp_path / "work/run/report/report.html").is_file()
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert {output.name for cell in code for output in cell.outputs if output.output_type == "stream"} == {"stdout"}

    found = json.loads(code[-1].outputs[0].text)
    assert found["report"]["unweighted_average_recall"]["low"] > 0.5
    assert found["answers"] == ["us", "england", "scotland"]
    before, after = found["aurocs"]["before training"], found["aurocs"]["after training"]
    for figures in (before, after):
        assert len(figures) == 4
        for v in figures.values():
            assert 0 <= v["low"] <= v["value"] <= v["high"] <= 1 and v["n"] == 8
    # What training is for: accents come together across voices, and voices matter less.
    assert after["accent"]["low"] > max(0.5, before["accent"]["high"])
    assert after["accent against voice"]["value"] > before["accent against voice"]["value"]
    assert found["read_out"]["accent"]["after training"] > 0.5
