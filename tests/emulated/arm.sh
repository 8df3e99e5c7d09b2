#!/usr/bin/env bash
# `make test-arm`: cross-compile the native library for aarch64 and run its tests on an emulated CPU: the C++ tests, and the
# operator tests of Python under the real aarch64 onnxruntime. An aarch64 Python comes from the apt sources of this machine,
# the wheels from pip's index; both are unpacked into build/arm and kept there, each step once.
#
#   PYTHON=python3         an interpreter with pip that fetches the wheels (never run on the emulated CPU)
#   ARM_TESTS="..."        the test files and options for pytest, in place of the ones below
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

WORK=$PWD/build/arm
ROOT=$WORK/root SITE=$WORK/site NATIVE=$WORK/native APT=$WORK/apt
PYTHON=${PYTHON:-python3}
WHEELS=(onnxruntime onnx numpy pytest pytest-timeout hypothesis)
# test_activations.py is not among them: it measures against the float32 product of numpy, whose error depends on the machine.
TESTS=(tests/ort_ops/test_{native_ops,ternary_matmul,ternary_ffn,route_gates,choice_among_many,outlier_activations,sparse_lookup_op}.py
  tests/ort_ops/test_{functions,panels,resolvent_ops}.py tests/parity/test_isa_parity.py)
CPUS=(max cortex-a72)
declare -A ISA=([max]=neon_dotprod [cortex-a72]=neon)
OPTIONS=(-q -p no:cacheprovider -o timeout=3000)

say() { printf '%s  %s\n' "$(date +%H:%M:%S)" "$*"; }
die() { printf 'test-arm: %s\n' "$*" >&2; exit 1; }

missing=()
for tool in aarch64-linux-gnu-g++ qemu-aarch64-static apt-get dpkg-deb cmake; do
  command -v "$tool" >/dev/null || missing+=("$tool")
done
if ((${#missing[@]})); then
  die "needs ${missing[*]}; on Debian: apt install --no-install-recommends cmake make g++-aarch64-linux-gnu qemu-user-static"
fi
"$PYTHON" -m pip --version >/dev/null || die "$PYTHON must have pip"
mkdir -p "$WORK"

# --- an aarch64 system with Python, no root needed: apt with folders and a list of installed packages of its own -----
if [[ ! -e $ROOT/.done ]]; then
  say "fetching Python for aarch64 (about 25 MB)"
  rm -rf "$APT" "$ROOT"
  mkdir -p "$APT"/{lists,archives}/partial "$ROOT"
  : >"$APT/status"
  apt=(apt-get -qq -o "Dir::State=$APT" -o "Dir::State::lists=$APT/lists" -o "Dir::State::status=$APT/status"
    -o "Dir::Cache=$APT" -o "Dir::Cache::archives=$APT/archives" -o APT::Architecture=arm64 -o APT::Architectures=arm64
    -o Debug::NoLocking=1 -o APT::Sandbox::User=)
  "${apt[@]}" update
  "${apt[@]}" install -y --download-only --no-install-recommends python3 libstdc++6 >/dev/null ||
    die "the apt sources of this machine must have packages for arm64 (Debian's do; Ubuntu's main mirrors do not)"
  for package in "$APT"/archives/*.deb; do dpkg-deb -x "$package" "$ROOT"; done
  # Emulators show the cpuinfo of the host, whose x86 lines crash the CPU detection of onnxruntime.
  mkdir -p "$ROOT/proc"
  for core in 0 1; do
    printf 'processor\t: %s\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\n' "$core"
    printf 'CPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd08\nCPU revision\t: 3\n\n'
  done >"$ROOT/proc/cpuinfo"
  touch "$ROOT/.done"
fi
INTERPRETER=$(readlink -f "$ROOT/usr/bin/python3")
VERSION=${INTERPRETER##*/python}
"$PYTHON" -c "import sys; sys.exit(tuple(map(int, '$VERSION'.split('.'))) < (3, 11))" ||
  die "the Python of the apt sources ($VERSION) must be >= 3.11 (Debian 12 or newer)"

# Beside the real interpreter, so that it finds its library; tests start workers with it as sys.executable.
LAUNCHER=$ROOT/usr/bin/emulated-python
cat >"$LAUNCHER" <<SH
#!/bin/sh
exec qemu-aarch64-static -L "$ROOT" -0 "$LAUNCHER" "$INTERPRETER" "\$@"
SH
chmod +x "$LAUNCHER"

# --- wheels ----------------------------------------------------------------------------------------------------------
if ! cmp -s constraints.txt "$SITE/.constraints"; then
  say "fetching the wheels of constraints.txt for aarch64, Python $VERSION (about 60 MB)"
  rm -rf "$WORK/wheels" "$SITE"
  platforms=()
  for glibc in 36 35 34 31 28 27 26 24 17; do platforms+=(--platform "manylinux_2_${glibc}_aarch64"); done
  "$PYTHON" -m pip download -q --disable-pip-version-check --only-binary=:all: "${platforms[@]}" \
    --platform manylinux2014_aarch64 --python-version "$VERSION" --implementation cp -c constraints.txt \
    -d "$WORK/wheels" "${WHEELS[@]}"
  mkdir -p "$SITE"
  for wheel in "$WORK"/wheels/*.whl; do "$PYTHON" -m zipfile -e "$wheel" "$SITE"; done
  cp constraints.txt "$SITE/.constraints"
fi

# --- the library -----------------------------------------------------------------------------------------------------
say "building the library and the C++ tests for aarch64"
cmake -S ort_ops/native -B "$NATIVE" -DTRIX_BUILD_TESTS=ON -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ >"$WORK/cmake.log" || die "cmake failed: $WORK/cmake.log"
cmake --build "$NATIVE" --parallel 2 >>"$WORK/cmake.log" || die "the build failed: $WORK/cmake.log"

# A copy of the package with the aarch64 library in it: the checkout may hold the one of this machine.
rm -rf "$WORK/package"
mkdir -p "$WORK/package"
cp -r ort_ops tests "$WORK/package"
rm -rf "$WORK/package/ort_ops/native"
cp "$NATIVE/libtrix_ort_ops.so" "$WORK/package/ort_ops/"

# --- tests -----------------------------------------------------------------------------------------------------------
read -r -a tests <<<"${ARM_TESTS:-${TESTS[*]}}"
export OMP_NUM_THREADS=1
for cpu in "${CPUS[@]}"; do
  export QEMU_CPU=$cpu
  say "$cpu: C++ tests"
  qemu-aarch64-static -L "$ROOT" "$NATIVE/kernel_tests"
  say "$cpu: self-test under the aarch64 onnxruntime"
  (cd "$WORK/package" && PYTHONPATH=$SITE "$LAUNCHER" -m ort_ops.self_test) &>"$WORK/self_test.log" ||
    die "the self-test failed: $WORK/self_test.log"
  for expected in "^native ok" "^portable ok" "instruction set ${ISA[$cpu]}\$"; do
    grep -E "$expected" "$WORK/self_test.log" || die "$WORK/self_test.log must say '$expected'"
  done
  say "$cpu: ${tests[*]}"
  (cd "$WORK/package" && PYTHONPATH=$SITE:$PWD:$PWD/tests/support "$LAUNCHER" -m pytest -c /dev/null \
    --rootdir . "${OPTIONS[@]}" "${tests[@]}")
done
say "all passed"
