"""Compiled parts are optional: without a compiler the PyTorch paths of `ctt.ops` serve."""

from setuptools import setup

setup()
