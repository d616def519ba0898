"""A plugin of pytest: runs the kernels, compiled for aarch64, in an emulator. KERNELS_FOLDER names a folder for files.

Each call of a kernel is a program of its own, which reads the tensors from a file and writes them back.
"""

import hashlib
import os
import subprocess
from pathlib import Path

import torch

from smallm.training.model.kernels import compiler, loader

COMPILER, EMULATOR, LIBRARIES = "aarch64-linux-gnu-gcc", "qemu-aarch64", "/usr/aarch64-linux-gnu"
FOLDER = Path(os.environ["KERNELS_FOLDER"])
PROGRAM = """
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
void {name}({types});
int main(int count, char **files)
{{
    const size_t sizes[] = {{{sizes}}}, n = sizeof sizes / sizeof *sizes;
    char *tensors[sizeof sizes / sizeof *sizes];
    FILE *file = fopen(files[1], "r+b");
    for (size_t i = 0; i < n; i++) {{
        tensors[i] = malloc(sizes[i] + 1);
        if (fread(tensors[i], 1, sizes[i], file) != sizes[i]) return 1;
    }}
    {name}({values});
    rewind(file);
    for (size_t i = 0; i < n; i++) fwrite(tensors[i], 1, sizes[i], file);
    return fclose(file);
}}
"""


def built(source: Path, *flags: str) -> Path:
    target = source.with_suffix(".o" if "-c" in flags else "")
    if not target.exists():
        command = [COMPILER, "-std=gnu11", "-fopenmp", *flags, str(source), "-o", str(target), "-lm"]
        subprocess.run(command, check=True)
    return target


class Emulated(loader.Kernels):
    def __init__(self) -> None:
        for source in Path(compiler.__file__).parent.glob("*.[ch]"):
            (FOLDER / source.name).write_bytes(source.read_bytes())
        self._object = built(FOLDER / "kernels.c", "-O2", "-fno-math-errno", "-c")

    def __call__(self, name: str, *arguments: torch.Tensor | int | float) -> None:
        tensors = [a.detach() for a in arguments if isinstance(a, torch.Tensor)]
        types, values, number = [], [], 0
        for a in arguments:
            if isinstance(a, torch.Tensor):
                assert a.is_contiguous()
                types.append("void *")
                values.append(f"tensors[{number}]")
                number += 1
            else:
                types.append("float" if isinstance(a, float) else "int64_t")
                values.append(f"{a.hex()}f" if isinstance(a, float) else str(a))
        source = PROGRAM.format(
            name=name, types=", ".join([*types, "int"]), values=", ".join([*values, str(torch.get_num_threads())]),
            sizes=", ".join(str(t.numel() * t.element_size()) for t in tensors),
        )  # fmt: skip
        file = FOLDER / f"{name}-{hashlib.sha256(source.encode()).hexdigest()[:16]}.c"
        file.write_text(source)
        data = FOLDER / "tensors"
        data.write_bytes(b"".join(t.numpy().tobytes() for t in tensors))
        program = built(file, str(self._object))
        subprocess.run([EMULATOR, "-L", LIBRARIES, str(program), str(data)], check=True)
        content = bytearray(data.read_bytes())
        for t in tensors:
            size = t.numel() * t.element_size()
            t.copy_(torch.frombuffer(content[:size], dtype=t.dtype).view(t.shape))
            del content[:size]


kernels = Emulated()
loader.load = lambda bf16=False: None if bf16 else kernels
