"""Tests that compile code with Inductor."""

import shutil

import pytest
import torch

NO_COMPILER = not any(map(shutil.which, ("c++", "g++", "clang++")))
needs_compiler = pytest.mark.skipif(
    NO_COMPILER or " " in torch.__file__,
    reason="torch.compile needs a C++ compiler, and cannot link against a torch in a path with a space",
)
