"""Compile the native library from the C files in this folder."""

import hashlib
import os
import shlex
import subprocess
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
LIBRARY = FOLDER / "libmaepl.so"
BUILD = "python -m util.data.native build"
MISSING_HEADERS = (
    "libjpeg-turbo's headers are missing: apt-get install libjpeg62-turbo-dev (Debian), libjpeg-turbo8-dev "
    "(Ubuntu), dnf install libjpeg-turbo-devel, or conda install libjpeg-turbo with "
    "CFLAGS=-I$CONDA_PREFIX/include LDFLAGS='-L$CONDA_PREFIX/lib -Wl,-rpath,$CONDA_PREFIX/lib'\n"
)


def source_id() -> str:
    """Return a hash of the C files. A library that was built from other files has another hash."""
    # Names too: a renamed file may change what is compiled.
    files = sorted([*FOLDER.glob("*.c"), *FOLDER.glob("*.h")])
    content = b"\0".join(f.name.encode() + f.read_bytes() for f in files)
    return hashlib.sha256(content).hexdigest()[:16]


def build(library: Path = LIBRARY, flags: tuple[str, ...] = ()) -> None:
    """Compile the C files to `library` with $CC (default cc), $CFLAGS and $LDFLAGS.

    Args:
        library: path of the shared library.
        flags: further flags for the compiler.

    Raises ValueError with the compiler's output if the compilation fails.
    """
    # Processes that use the old file keep it: the new one replaces it in a single step.
    temporary = library.with_suffix(f".{os.getpid()}.tmp")
    command = _command(temporary, flags)
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise ValueError(
            f"no C compiler: {error}. Install one (apt-get install gcc) or name it by CC=..."
        ) from error
    if done.returncode:
        hint = ""
        # The usual reason, whose remedy depends on the system.
        if "jpeglib.h" in done.stderr:
            hint = MISSING_HEADERS
        raise ValueError(f"{hint}{shlex.join(command)} failed:\n{done.stderr}")
    os.replace(temporary, library)


def _command(output: Path, flags: tuple[str, ...]) -> list[str]:
    """Return the words of the compiler's command line."""
    return [
        *shlex.split(os.environ.get("CC", "cc")),
        "-std=c11",
        "-D_DEFAULT_SOURCE",
        "-O3",
        "-fPIC",
        "-shared",
        f'-DSOURCE_ID="{source_id()}"',
        *flags,
        *shlex.split(os.environ.get("CFLAGS", "")),
        *map(str, sorted(FOLDER.glob("*.c"))),
        "-o",
        str(output),
        *shlex.split(os.environ.get("LDFLAGS", "")),
        # The linker resolves from left to right, so libraries follow the files that use them.
        "-ljpeg",
        "-lm",
    ]
