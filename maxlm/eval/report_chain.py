"""The report's part on provenance: every stage's manifest, from documents to the last model."""

import json
import os
from html import escape
from pathlib import Path
from typing import Any

from maxlm.eval.html_parts import facts, flat_facts, folded, paragraph, section, to_dict

_HASH_CHARACTERS = 12
_KEY_FACTS = 14


def chain_section(chain: list[dict[str, Any]], folder: Path) -> str:
    """The manifests in the order in which their stages ran; an input links to the stage that made it."""
    places = {str(item.get("folder")): index for index, item in enumerate(chain)}
    items = "".join(_stage(item, index, chain, places, folder) for index, item in enumerate(chain))
    if not items:
        return ""
    explained = paragraph(
        "Each stage names what it read by a hash of its content, so that a model leads back to its documents. A hash is"
        " marked where it no longer is that of the stage above."
    )
    return section("Where it comes from", explained, f'<ol class="chain">{items}</ol>')


def _stage(item: dict, index: int, chain: list[dict], places: dict[str, int], folder: Path) -> str:
    own_folder = str(item.get("folder", ""))
    stage, created = escape(str(item.get("stage", "stage"))), escape(str(item.get("created", "")))
    told = [
        f'<li id="stage-{index}"><h3>{stage}</h3>',
        f"<code>{escape(_relative(own_folder, folder))}</code>"
        f' <span class="muted">{created} · <code>{escape(_short(item.get("hash")))}</code></span>',
        _inputs(to_dict(item.get("inputs")), own_folder, chain, places, folder),
        facts(flat_facts(to_dict(item.get("metrics")), limit=_KEY_FACTS)),
    ]
    for name in ("config", "versions"):
        if value := to_dict(item.get(name)):
            told.append(folded(name.capitalize(), json.dumps(value, indent=2, ensure_ascii=False)))
    return "".join(told) + "</li>"


def _inputs(inputs: dict, own_folder: str, chain: list[dict], places: dict[str, int], folder: Path) -> str:
    told = []
    for name, value in inputs.items():
        path, digest = str(to_dict(value).get("path", "")), to_dict(value).get("hash")
        absolute = os.path.normpath(os.path.join(own_folder, path))
        index = places.get(absolute)
        text = f"<code>{escape(_relative(absolute, folder))}</code>"
        if index is not None:
            same = chain[index].get("hash") == digest
            mark = '<span class="good">same hash</span>' if same else '<span class="bad">changed since</span>'
            text = f'<a href="#stage-{index}">{text}</a> {mark}'
        told.append(f"<div><dt>{escape(name)}</dt><dd>{text} <code>{escape(_short(digest))}</code></dd></div>")
    return f'<dl class="facts">{"".join(told)}</dl>' if told else ""


def _relative(path: str, folder: Path) -> str:
    """As seen from the report, where it is near; else whole."""
    if not path:
        return ""
    relative = os.path.relpath(path, folder.resolve())
    return path if relative.startswith(os.path.join("..", "..", "..")) else relative


def _short(digest: Any) -> str:
    return digest[:_HASH_CHARACTERS] if isinstance(digest, str) else ""
