import hashlib
import subprocess
import sys

import pytest

from maxlm.data.embedded import Document, read_embedded


@pytest.fixture(scope="module")
def documents() -> dict[str, Document]:
    return {document.id: document for document in read_embedded()}


def test_corpus_has_millions_of_characters_with_source_and_licence(documents):
    assert sum(len(document.text) for document in documents.values()) > 3_000_000
    assert {(document.source, document.licence) for document in documents.values()} == {("python:stdlib", "PSF-2.0")}
    assert {name.split("/")[0] for name in documents} == {"module", "topic", "compiled"}


def test_module_text_has_named_docstrings_and_comments_in_order(documents):
    text = documents["module/heapq"].text
    assert text.startswith("heapq\n\nHeap queue algorithm (a.k.a. priority queue).")
    places = [text.index(part) for part in ("heapq.heappush\n\nPush item onto heap", "# 'heap' is a heap"[2:], "merge")]
    assert places == sorted(places)
    assert "import" not in documents["module/this"].text


def test_string_that_looks_like_a_comment_is_ignored(tmp_path, monkeypatch):
    (tmp_path / "sample.py").write_text(
        '"""Doc."""\n# first\n# second\nx = """\n# no comment\n"""\n\n\n'
        'def f():\n    "What f does."\n    # -----\n    # third\n'
    )
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_it.py").write_text('"""Not wanted."""')
    (tmp_path / "broken.py").write_text("def (:\n# lost")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    modules = {d.id: d.text for d in read_embedded() if d.id.startswith("module/")}
    assert modules == {
        "module/sample": "sample\n\nDoc.\n\nfirst\nsecond\n\nsample.f\n\nWhat f does.\n\nthird",
        "module/broken": "",
    }


def test_compiled_modules_yield_their_docstrings_once(documents):
    text = documents["compiled/_bisect"].text
    assert "_bisect.bisect_left(a, x, lo=0, hi=None, *, key=None)" in text
    slots = sum("See help(type(self)) for accurate signature." in d.text for d in documents.values())
    assert slots <= 2


def test_corpus_is_deterministic_and_imports_no_module_with_side_effects(documents):
    code = (
        "import hashlib, sys; from maxlm.data.embedded import read_embedded\n"
        "documents = list(read_embedded())\n"
        "bad = {'this', 'antigravity', 'idlelib', 'turtle', 'tkinter', 'test'} & {*sys.modules}\n"
        "assert not bad, bad\n"
        "sys.stderr.write(hashlib.sha256(repr(documents).encode()).hexdigest())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == ""
    assert run.stderr == hashlib.sha256(repr(list(documents.values())).encode()).hexdigest()
