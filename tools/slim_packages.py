"""Takes out of installed packages what asd never runs: `python tools/slim_packages.py ENVIRONMENT`.

The Dockerfile calls it in the stages that install; the tests on a cluster run the images that come of it.
Needs the standard library alone, and `strip` of binutils.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

# Places under site-packages: converters, sample data, headers and tests.
UNUSED = (
    "numpy/_core/include",
    "numpy/_core/lib",
    "numpy/random/lib",
    "numpy/**/tests",
    "onnx/backend/test",
    "onnxruntime/backend",
    "onnxruntime/datasets",
    "onnxruntime/quantization",
    "onnxruntime/tools",
    "onnxruntime/transformers",
    "onnxruntime_genai/models",
    # What colours source code, of which asd shows none: rich wants the package alone.
    "pygments/lexers/[!_]*.py",
    "pygments/lexers/_*_builtins.py",
    "pygments/lexers/__pycache__/[!_]*.pyc",
    "pygments/lexers/__pycache__/_*_builtins.*.pyc",
    "pyarrow/include",
    "pyarrow/src",
    "pyarrow/tests",
    "scipy/**/tests",
    "sklearn/**/tests",
    "**/*.pxd",
    "**/*.pyi",
)
# Places, and the package that alone needs them. The shared library, 35 MB, lies beside Python's own binding.
UNUSED_WITHOUT = {
    "numpy/distutils": "scipy",
    "numpy/f2py": "scipy",
    "onnxruntime/capi/libonnxruntime.so*": "onnxruntime_genai",
}
# Built with symbols. Not numpy: what auditwheel has patched (*.libs) does not load once it is stripped.
WITH_SYMBOLS = ("uvloop", "yaml")


def slim(packages: Path) -> None:
    """Slim the packages of a folder. Raises RuntimeError where there is no `strip`."""
    alone = [place for place, user in UNUSED_WITHOUT.items() if not (packages / user).exists()]
    for pattern in (*UNUSED, *alone):
        for path in list(packages.glob(pattern)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    libraries = [str(path) for name in WITH_SYMBOLS for path in packages.glob(f"{name}/*.so")]
    strip = shutil.which("strip")
    if strip is None:
        raise RuntimeError("there is no `strip` to take symbols out of libraries: install binutils")
    if libraries:
        subprocess.run([strip, "--strip-unneeded", *libraries], check=True)


if __name__ == "__main__":
    try:
        for folder in Path(sys.argv[1]).glob("lib/python3*/site-packages"):
            slim(folder)
    except IndexError:
        sys.exit("usage: python tools/slim_packages.py ENVIRONMENT")
    except RuntimeError as error:
        sys.exit(str(error))
