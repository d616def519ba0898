"""A plugin of pytest: compiles and loads the kernels as on macOS, with Clang and Clang's OpenMP library.

KERNELS_OPENMP names that library. The flags of Apple's linker are left out by the compiler that CC names.
"""

import os
from pathlib import Path

from smallm.training.model.kernels import compiler, loader

compiler.SYSTEM = "Darwin"
compiler._has_developer_tools = lambda: True
compiler.openmp_library = loader.openmp_library = lambda: Path(os.environ["KERNELS_OPENMP"])
assert loader.load() is not None
