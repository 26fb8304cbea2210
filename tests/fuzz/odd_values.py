"""Values that a user may write by mistake, and trees that contain one."""

import copy
import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
RECIPES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted((ROOT / "configs").rglob("*.yaml"))
}

TEXTS = [
    "",
    " ",
    "null",
    "é",
    "½",
    "a\nb",
    "\t",
    "~",
    "..",
    "/",
    "*",
    "[",
    "{}",
    "-1",
    "1e5",
    "nan",
    "no",
    "=",
    "\ufeff",
    "🙂" * 9,
]
TEXTS += [
    "a" * 300,
    "x" * 5000,
    "a/" * 200,
    "hf:",
    "tfds:",
    "tfds:none:",
    "python:",
    "python:none",
    "a.jsonl.gz",
    "%s{0}",
]
NUMBERS = [0, -1, 1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64, 2**70, -(2**70), 10**300, 10**400]
FLOATS = [0.0, -0.0, 0.5, 1.0, 1.5, -1.5, 1e-320, 1e-30, 1e30, 1e308, float("inf"), float("-inf"), float("nan")]

scalars = st.one_of(
    st.sampled_from([None, True, False]), st.sampled_from(NUMBERS), st.sampled_from(FLOATS), st.sampled_from(TEXTS)
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["kind", "a", "", "0", "path"]), inner, max_size=3)
    ),
    max_leaves=4,
)


def places(tree: Any, above: tuple = ()) -> list[tuple]:
    """The paths of everything in a tree of dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path for key, value in items for path in [(*above, key), *places(value, (*above, key))]]


@st.composite
def changed(draw, tree: Any, most: int = 2) -> Any:
    """A tree with one or more entries dropped, renamed, moved, duplicated or given an odd value."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, most))):
        paths = places(tree)
        if not paths:
            return draw(values)
        *above, key = draw(st.sampled_from(paths))
        node = tree
        for step in above:
            node = node[step]
        match draw(st.sampled_from(["value", "value", "value", "drop", "rename", "more", "wrap"])):
            case "value":
                node[key] = draw(values)
            case "drop":
                del node[key]
            case "rename" if isinstance(node, dict):
                node[draw(st.sampled_from([f"{key}s", str(key)[1:], str(key).upper(), "", "kind", "é"]))] = node.pop(
                    key
                )
            case "wrap":
                node[key] = draw(st.sampled_from([[node[key]], {"a": node[key]}, [node[key]] * 3, str(node[key])]))
            case _:
                other = draw(values)
                node.append(other) if isinstance(node, list) else node.update(
                    {draw(st.sampled_from(["x", "weight", "path"])): other}
                )
    return tree


@st.composite
def broken_text(draw, text: str) -> bytes:
    """The text as bytes, with something removed, inserted or repeated."""
    raw = text.encode("utf-8", "surrogatepass")
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(raw)))
        match draw(st.sampled_from(["cut", "take", "put", "double"])):
            case "cut":
                raw = raw[:at]
            case "take":
                raw = raw[:at] + raw[at + draw(st.integers(1, 9)) :]
            case "put":
                raw = raw[:at] + draw(st.sampled_from(PIECES)) + raw[at:]
            case "double":
                begin = raw.rfind(b"\n", 0, at) + 1
                end = raw.find(b"\n", at) + 1 or len(raw)
                raw = raw[:end] + raw[begin:end] + raw[end:]
    return raw


PIECES = [
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\r",
    b"\n",
    b"\n\n",
    b"\x0c",
    b"\xe2\x80\xa8",
    b"\t",
    b"'",
    b'"',
    b"{",
    b"}",
]
PIECES += [
    b"[",
    b"[" * 3000,
    b'{"a":' * 3000,
    b"9" * 5000,
    b"- ",
    b": ",
    b"&a ",
    b"*a ",
    b"!!binary ",
    b"!x ",
    b"%",
    b"---\n",
    b"NaN",
    b"\\ud800",
]


keys = st.sampled_from(
    [
        "steps",
        "seed",
        "output",
        "kind",
        "optim",
        "optim.schedule.kind",
        "model.layers",
        "model.layers.repeat",
        "model.layers.mlp.kind",
        "model.layers.pattern.0.mixer",
        "model.layers.0.mixer.window",
        "sources.0.uri",
        "sources.5",
        "fields.a",
        "method.kind",
        "scales.ladder.0",
        "objective.sources.0.weight",
        ".",
        "a..b",
        "mesh.fsdp",
        "²",
        "objective",
        "base",
        "",
        "a." * 99,
    ]
)
texts_of_values = st.sampled_from(["[" * 3000, "9" * 5000, "{", "&a [*a]", "!!bool x", "'", "a: b: c"])
overrides = st.builds(
    lambda key, value: f"{key}={value}", keys, st.one_of(scalars.map(str), values.map(json.dumps), texts_of_values)
)
