"""Lets the tests of this folder import the suite they inherit."""

import pathlib
import sys

import pytest

pytest.register_assert_rewrite("codec_suite")
sys.path.insert(0, str(pathlib.Path(__file__).parent))
