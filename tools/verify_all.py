"""Verify every recipe, and write the summary in docs/verify.md and all variants to runs/verify.md.

    python tools/verify_all.py [CONFIG ...]

Without arguments: all files of kind train under configs/. The summary is between two marks in the page; the text
before them is written by hand. Exits with 1 if any recipe differs.
"""

import sys
from pathlib import Path

from maxlm.runtime.platform import prepare_platform, use_virtual_devices

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "verify.md"
VARIANTS = ROOT / "runs" / "verify.md"
BEGIN, END = "<!-- summary: begin -->\n", "<!-- summary: end -->\n"


def main(paths: list[str]) -> int:
    prepare_platform()
    use_virtual_devices(8)
    from maxlm.verify.run import verify
    from maxlm.verify.show import markdown, summary

    reports = []
    for path in paths or recipes():
        reports.append(verify(load(path), title=path))
        head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}\n{summary(reports)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
        VARIANTS.parent.mkdir(exist_ok=True)
        VARIANTS.write_text("\n".join(map(markdown, reports)), encoding="utf-8")
        print(path, "passed" if reports[-1].passed else "DIFFERS", f"{reports[-1].seconds:.0f} s", flush=True)
    return 0 if all(report.passed for report in reports) else 1


def recipes() -> list[str]:
    """Files of kind train, from the repository's root."""
    import yaml

    found = [path for path in (ROOT / "configs").rglob("*.yaml") if yaml.safe_load(path.read_text())["kind"] == "train"]
    return [str(path.relative_to(ROOT)) for path in sorted(found)]


def load(path: str):
    from maxlm.config.load import load_config

    return load_config(ROOT / path, kind="train")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
