"""maxlm builds large language models end to end in JAX."""

from importlib.metadata import version

__version__ = version("maxlm")


def load(path, *, ema=False, adapters=None):
    """Load a model for inference: see `maxlm.generate.model.load`."""
    from maxlm.runtime.platform import prepare_platform

    prepare_platform()
    from maxlm.generate.model import load as load_model

    return load_model(path, ema=ema, adapters=adapters)
