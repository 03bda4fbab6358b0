from Cython.Build import cythonize
from setuptools import Extension, setup

setup(
    ext_modules=cythonize(
        [
            Extension(
                "vfiomig._fastcopy",
                ["src/_fastcopy.pyx", "src/fastcopy/xxh3_avx2.c"],
                include_dirs=["src/fastcopy"],
                depends=["src/fastcopy/xxh3_avx2.h"],
                extra_compile_args=["-O3", "-Wall", "-Wextra", "-Wno-unused-parameter"],
            )
        ]
    )
)
