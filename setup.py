"""Build the CPU kernels with torch's tooling; the rest of the package is in pyproject.toml.

They are optional. Without torch in the building environment (pip: `--no-build-isolation`) or without a compiler the
package installs without them, and does the same with torch's own operations.
"""

from __future__ import annotations

import sys

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    setup()
else:
    OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]
    kernels = CppExtension(
        "vblora._kernels",
        ["vblora/csrc/kernels.cpp"],
        extra_compile_args=["-O3", "-g0", "-fno-math-errno", *OPENMP],
        extra_link_args=OPENMP,
        optional=True,
    )
    setup(ext_modules=[kernels], cmdclass={"build_ext": BuildExtension.with_options(use_ninja=False)})
