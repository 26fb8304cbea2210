"""What is made here, read by Hugging Face's transformers itself; collected where the extra `parity` is installed."""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("transformers") is None or find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]

for folder in ("families", "tokenizer"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
