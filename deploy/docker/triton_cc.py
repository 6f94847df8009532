#!/opt/loraplex/bin/python
"""Stands in the CUDA image where a C compiler would: hands out the one module that was compiled with the image.

Triton compiles its kernels with what it ships, but reaches the driver through a small C module (driver.c, "cuda_utils")
that it gives to $CC the first time. `triton-cc --prepare`, in the build stage, which has gcc, compiles that file for
the installed Triton; called as a compiler, in the image, it finds the result by the source's SHA-256 and copies it to
the place after -o. Any other source is given to gcc if somebody installed it, and else refused.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

STORE = Path(sys.prefix) / "triton"
SOURCES = (".c", ".cc", ".cpp", ".cxx")


def compiled(source: Path) -> Path:
    return STORE / f"{hashlib.sha256(source.read_bytes()).hexdigest()}.so"


def prepare() -> int:
    """Compiles the installed Triton's driver.c into STORE."""
    import sysconfig

    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        sys.stderr.write("triton is not installed\n")
        return 1
    backend = Path(spec.origin).parent / "backends" / "nvidia"
    source = backend / "driver.c"
    STORE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        # The driver is the host's: an empty library of its name gives the module the right reference to it.
        stub = Path(work) / "libcuda.so.1"
        empty = Path(work) / "empty.c"
        empty.write_text("")
        subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", stub, empty], check=True)
        command = ["gcc", source, "-O3", "-shared", "-fPIC", "-Wno-psabi", "-o", compiled(source)]
        command += [
            f"-L{work}",
            "-Wl,--no-as-needed",
            "-l:libcuda.so.1",
            f"-I{backend / 'include'}",
            f"-I{sysconfig.get_paths()['include']}",
        ]
        subprocess.run(command, check=True)
    return 0


def main(arguments: list[str]) -> int:
    if arguments == ["--prepare"]:
        return prepare()
    sources = [path for each in arguments if (path := Path(each)).suffix in SOURCES and path.is_file()]
    outputs = [target for option, target in itertools.pairwise(arguments) if option == "-o"]
    if len(sources) == len(outputs) == 1 and compiled(sources[0]).is_file():
        shutil.copyfile(compiled(sources[0]), outputs[0])
        return 0
    if gcc := shutil.which("gcc"):
        return subprocess.run([gcc, *arguments], check=False).returncode
    names = ", ".join(str(each) for each in sources) or " ".join(arguments)
    sys.stderr.write(
        f"triton-cc: {names} is not what was compiled when this image was built, and the image has no compiler: "
        "build an image FROM this one with gcc, libc6-dev and python3-dev\n"
    )
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
