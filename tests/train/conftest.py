"""A run shared by several test modules."""

import jax
import pytest
from tiny_run import tiny_config


@pytest.fixture(scope="session")
def short_run(tmp_path_factory, tiny_data_folder):
    """A finished run of four steps."""
    from maxlm.train.run import train

    folder = tmp_path_factory.mktemp("short") / "run"
    jax.config.update("jax_disable_most_optimizations", True)
    train(tiny_config(folder, tiny_data_folder, steps=4))
    jax.config.update("jax_disable_most_optimizations", False)
    return folder
