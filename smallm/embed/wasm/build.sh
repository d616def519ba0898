#!/bin/sh
# Builds smallm.wasm from smallm.c: sh build.sh [OUTPUT [SOURCE]], two absolute paths. Needs clang
# and lld (on Debian: apt-get install clang lld).
# The committed file is from clang 14.0.6; other versions give other bytes, which write the same text.
# -finline-hint-functions keeps functions small: an engine runs slow code until it has optimised a whole function.
set -eu
cd "$(dirname "$0")"
output=${1:-../js/smallm.wasm}
source=${2:-../c/smallm.c}
headers=$(mktemp -d)
trap 'rm -r "$headers"' EXIT
for name in math stdio stdlib string; do : > "$headers/$name.h"; done
${CLANG:-clang} --target=wasm32 -std=c11 -O2 -finline-hint-functions -msimd128 -mbulk-memory -ffp-contract=off -nostdlibinc -nostdlib \
  -fno-builtin-malloc -fno-builtin-calloc -fvisibility=hidden -DSMALLM_SHARED -Wall -Wextra -Werror \
  -isystem "$headers" -include libc.h "$source" libc.c \
  -Wl,--no-entry,--export-dynamic,--export=malloc,--export=free,--stack-first,--strip-all,-z,stack-size=262144 -o "$output"
chmod 644 "$output"
