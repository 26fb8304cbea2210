"""Writes the table of docs/families.md: each tiny model of tests/families, by maxlm and by transformers.

python tools/family_table.py        # needs transformers, for the tokenizers: the extra `parity`
"""

import functools
import sys
import tempfile
from pathlib import Path

from maxlm.runtime.platform import prepare_platform

prepare_platform()

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import chatglm_comparison  # noqa: E402
import family_equations  # noqa: E402
from family_cases import CASES, SCORE_CASES, tokenizer_kind  # noqa: E402
from family_comparison import compare, compare_scores, write_folder  # noqa: E402
from tokenizer_kinds import KINDS, TEXTS  # noqa: E402
from transformers import AutoTokenizer, LlamaTokenizer  # noqa: E402

from maxlm.interop.huggingface import load_huggingface, write_huggingface  # noqa: E402

PAGE = ROOT / "docs" / "families.md"
COLUMNS = (
    "model",
    "`model_type`",
    "logits",
    "with a cache",
    "gradient norm",
    "greedy text",
    "tensors",
    "settings",
    "tokenizer",
)
BEGIN = f"| {COLUMNS[0]} | {COLUMNS[1]} |"


@functools.cache
def tokenizer_cell(case: str, kind: str) -> str:
    """The kind, and whether transformers' tokenizer in the exported folder of a model gives the ids that ours gives."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        name, _, is_converted = kind.partition(", ")
        KINDS[name](path)
        if is_converted:
            LlamaTokenizer.from_pretrained(path).save_pretrained(path)
            (path / "tokenizer.model").unlink()
        write_folder(path, CASES[case] | {"vocab_size": 700})
        model, ours = load_huggingface(path)
        (path / "out").mkdir()
        write_huggingface(path / "out", model, ours, {})
        theirs = AutoTokenizer.from_pretrained(path / "out")
        are_same = all(theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text) for text in TEXTS)
    return f"{kind}: {_yes(are_same)}"


def rows():
    with_model = {case["model_type"]: name for name, case in reversed(CASES.items())}
    for name, settings in (CASES | SCORE_CASES).items():
        model_type = settings["model_type"]
        with tempfile.TemporaryDirectory() as folder:
            if name in CASES:
                compared = compare(name, Path(folder))
                numbers = [_number(compared.logits), _number(compared.cached_logits), _number(compared.gradient_norm)]
                greedy = _yes(compared.same_greedy)
            else:
                compared = compare_scores(name, Path(folder))
                numbers, greedy = [_number(compared.scores), "", _number(compared.gradient_norm)], ""
        exact = [greedy, _yes(compared.same_tensors), _yes(compared.same_model)]
        yield [name, f"`{model_type}`", *numbers, *exact, tokenizer_cell(with_model[model_type], tokenizer_kind(name))]
    for name, settings in chatglm_comparison.CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            equal = chatglm_comparison.compare_with_authors(name, Path(folder))
        numbers = [_number(equal.logits), "", _number(equal.gradient_norm)]
        exact = [_yes(equal.same_greedy), _yes(equal.same_tensors), _yes(equal.same_model)]
        yield [name, f"`{settings['model_type']}`", *numbers, *exact, ""]
    for name, settings in family_equations.CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            equal = family_equations.compare_with_equations(name, Path(folder))
        numbers = [_number(equal.logits), _number(equal.cached_logits), ""]
        exact = ["", _yes(equal.same_tensors), _yes(equal.same_model)]
        yield [name, f"`{settings['model_type']}`", *numbers, *exact, ""]


def _number(difference: float) -> str:
    return f"{difference:.1e}"


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "NO"


def main() -> None:
    table = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    for row in rows():
        table.append(f"| {' | '.join(row)} |")
        print(*row, flush=True)
    text = PAGE.read_text(encoding="utf-8")
    start = text.index(BEGIN)
    end = text.find("\n\n", start)
    PAGE.write_text(text[:start] + "\n".join(table) + (text[end:] if end >= 0 else "\n"), encoding="utf-8")


if __name__ == "__main__":
    main()
