"""Writes the table of docs/families.md: each tiny model of tests/families, by maxlm and by transformers.

python tools/family_table.py
"""

import sys
import tempfile
from pathlib import Path

from maxlm.runtime.platform import prepare_platform

prepare_platform()

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from family_cases import CASES, SCORE_CASES  # noqa: E402
from family_comparison import compare, compare_scores  # noqa: E402

PAGE = ROOT / "docs" / "families.md"
BEGIN = "| model | `model_type` |"


def main() -> None:
    rows = []
    for name, settings in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            compared = compare(name, Path(folder))
        exact = ["yes" if each else "NO" for each in (compared.same_greedy, compared.same_tensors, compared.same_model)]
        numbers = (compared.logits, compared.cached_logits, compared.gradient_norm)
        rows.append([name, f"`{settings['model_type']}`", *(f"{each:.1e}" for each in numbers), *exact])
        print(*rows[-1])
    for name, settings in SCORE_CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            scored = compare_scores(name, Path(folder))
        exact = ["yes" if each else "NO" for each in (scored.same_tensors, scored.same_model)]
        numbers = (f"{scored.scores:.1e}", "", f"{scored.gradient_norm:.1e}", "")
        rows.append([name, f"`{settings['model_type']}`", *numbers, *exact])
        print(*rows[-1])
    table = [
        f"{BEGIN} logits | with a cache | gradient norm | greedy text | tensors | settings |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    text = PAGE.read_text(encoding="utf-8")
    start = text.index(BEGIN)
    end = text.find("\n\n", start)
    PAGE.write_text(text[:start] + "\n".join(table) + (text[end:] if end >= 0 else "\n"), encoding="utf-8")


if __name__ == "__main__":
    main()
