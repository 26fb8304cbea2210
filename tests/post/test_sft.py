"""Fine-tuning learns what the assistant says."""

from maxlm.generate.rollout import rollout
from tests.post.conftest import COLORS


def test_it_learns_the_task(tuned):
    _, manifest = tuned
    print(manifest["metrics"])
    assert manifest["metrics"]["valid"]["loss"] < 0.3
