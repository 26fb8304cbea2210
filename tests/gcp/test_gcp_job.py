"""All invalid values are reported at once, with the allowed ones, before any command is built."""

import pytest
from maxlm_gcp.job import GENERATIONS, Tpu

from maxlm.errors import ConfigError


@pytest.mark.parametrize(
    ("accelerator_type", "runtime_version"),
    [
        ("v4-32", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_each_generation_has_its_own_image(make_job, accelerator_type, runtime_version):
    assert make_job(accelerator_type=accelerator_type).generation.runtime_version == runtime_version


def test_every_generation_is_covered_above():
    assert set(GENERATIONS) == {"v4", "v5litepod", "v5p", "v6e"}


@pytest.mark.parametrize(
    ("accelerator_type", "said"),
    [
        ("v5e-16", "is called v5litepod-16"),
        ("tpu7x-8", "only through GKE"),
        ("v5litepod-17", "has sizes 1, 4, 8, 16"),
        ("v5p-12", "multiple of 8"),
        ("v9-8", "use one of v4-N, v5litepod-N, v5p-N, v6e-N"),
        ("v4", "is unknown"),
        ("v6e-08", "is unknown"),
        ("v5p--8", "is unknown"),
    ],
)
def test_invalid_accelerator_raises_with_the_remedy(make_job, accelerator_type, said):
    with pytest.raises(ConfigError, match=said):
        make_job(accelerator_type=accelerator_type)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"bucket": "my-bucket"}, "is not a gs:// path"),
        ({"bucket": "gs://my bucket"}, "is not a gs:// path"),
        ({"config": "/etc/train.yaml"}, "inside the code folder"),
        ({"config": "../train.yaml"}, "inside the code folder"),
        ({"overrides": ("steps",)}, "is not key=value"),
        ({"overrides": ("output=/tmp/x",)}, "the run folder is <bucket>/<name>"),
        ({"inputs": {"../x": "gs://my-bucket/x"}}, "inside the code folder"),
        ({"inputs": {"x": "/x"}}, "is not a gs:// path"),
        ({"environment": {"A B": "1"}}, "is not a valid variable name"),
        ({"service_account": "me"}, "is not an e-mail address"),
        ({"python_version": "latest"}, "is not a version such as 3.11"),
    ],
)
def test_invalid_value_raises_with_its_name(make_job, fields, said):
    with pytest.raises(ConfigError, match=said):
        make_job(**fields)


def test_all_mistakes_are_reported_at_once(make_job):
    with pytest.raises(ConfigError) as caught:
        make_job(accelerator_type="v9-8", bucket="my-bucket", overrides=("steps",))
    assert len(caught.value.problems) == 3


def test_tpu_fields_are_validated_too():
    with pytest.raises(ConfigError) as caught:
        Tpu(name="Big_One", project="x", zone="west")
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["name", "project", "zone"]


def test_run_folder_is_named_after_the_job(make_job):
    job = make_job(bucket="gs://my-bucket/runs/", overrides=("steps=2",))
    assert job.run_folder == "gs://my-bucket/runs/tiny-1"
    arguments = ("train", "train.yaml", "steps=2", "output=gs://my-bucket/runs/tiny-1")
    assert job.train_arguments == (*arguments, "--supervise=10")
    alone = make_job(bucket="gs://my-bucket/runs/", overrides=("steps=2",), restarts=0)
    assert alone.train_arguments == arguments


def test_negative_restarts_raise(make_job):
    with pytest.raises(ConfigError, match="restarts: -1 must be 0 or more"):
        make_job(restarts=-1)
