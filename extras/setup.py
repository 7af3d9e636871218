"""Packs two folders of the source tree that this one lies in; nothing is copied beforehand."""

from setuptools import setup

setup(
    packages=["rfkernels_extras", "rfkernels_extras.benchmarks", "rfkernels_extras.weights"],
    package_dir={
        "rfkernels_extras.benchmarks": "../benchmarks",
        "rfkernels_extras.weights": "../rfkernels/tools/tiny/weights",
    },
    package_data={"rfkernels_extras.benchmarks": ["*.json", "*.md"], "rfkernels_extras.weights": ["*"]},
    include_package_data=False,
)
