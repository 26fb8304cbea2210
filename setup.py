"""What pyproject.toml cannot say: gcp/ is installed as `maxlm_gcp`, a name that collides with nothing."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["maxlm*"]), "maxlm_gcp"], package_dir={"maxlm_gcp": "gcp"})
