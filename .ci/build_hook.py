"""Build hook of hatchling: with SMALLM_PREBUILT=1 the wheel holds the compiled native engine, for one platform.

Without the variable the wheel is for every platform, and the engine is compiled at first use.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FLAGS = ["-O2", "-std=c99", "-shared"]


class BuildHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict) -> None:
        """Compiles `smallm.c` with the C compiler in CC (default: cc, on Windows gcc) and adds the library."""
        if os.environ.get("SMALLM_PREBUILT") != "1" or version == "editable":
            return
        windows = sys.platform == "win32"
        flags = ["-DSMALLM_SHARED", "-DSMALLM_BUILD", "-static-libgcc"] if windows else ["-fPIC"]
        self.folder = tempfile.TemporaryDirectory()
        library = Path(self.folder.name) / ("smallm_native.dll" if windows else "smallm_native.so")
        compiler = os.environ.get("CC", "gcc" if windows else "cc").split()
        source = Path(self.root) / "smallm" / "embed" / "c" / "smallm.c"
        subprocess.run([*compiler, *FLAGS, *flags, str(source), "-lm", "-o", str(library)], check=True)
        build_data["force_include"][str(library)] = f"smallm/inference/{library.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict, artifact_path: str) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()
