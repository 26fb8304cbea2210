"""What is made here, read by Hugging Face's transformers itself; collected where the extra `parity` is installed."""

from importlib.util import find_spec

if find_spec("transformers") is None or find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]
