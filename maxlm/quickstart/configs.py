"""Where the recipes lie."""

import sys
from pathlib import Path

from maxlm.errors import ConfigError


def config_folder() -> Path:
    """configs/quickstart of the checkout, or of the installed package's shared files.

    Raises:
      ConfigError: there is neither.
    """
    checkout = Path(__file__).resolve().parents[2] / "configs" / "quickstart"
    installed = Path(sys.prefix) / "share" / "maxlm" / "configs" / "quickstart"
    for folder in (checkout, installed):
        if folder.is_dir():
            return folder
    raise ConfigError([f"neither {checkout} nor {installed} is there; install maxlm again"])
