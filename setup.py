from Cython.Build import cythonize
from setuptools import Extension, setup

setup(
    ext_modules=cythonize(
        [
            Extension(
                "vfiomig._fastcopy",
                ["src/_fastcopy.pyx"],
                extra_compile_args=["-O3", "-Wall", "-Wextra", "-Wno-unused-parameter"],
            )
        ]
    )
)
