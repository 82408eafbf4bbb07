# shellcheck shell=bash
# The stages that .ci/run and .ci/full are made of. Sourced, with `set -euo pipefail` on; every command that fails ends the run.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
exec </dev/null
unset PYTHONPATH PYTEST_ADDOPTS JNORM_KERNELS JNORM_ISA
export CI=true JAX_PLATFORMS=cpu PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1

tools=$PWD/.ci/venv/bin         # ruff, pyright, examples, benchmarks
oldest=$PWD/.ci/venv-oldest/bin # the oldest supported JAX
out=$PWD/.ci/out                # test reports, wheels, and what the examples write
rm -rf "$out"
mkdir -p "$out"

torch=$(sed -n 's/^torch = \["\(.*\)"\]$/\1/p' pyproject.toml)
pyright=$(sed -n 's/^dev = .*"\(pyright==[0-9.]*\)".*/\1/p' pyproject.toml)
oldest_of() { sed -n "s/^dependencies = .*\"$1>=\([0-9.]*\)\".*/\1/p" pyproject.toml; }
oldest_jax=$(oldest_of jax)
oldest_flax=$(oldest_of flax)

# Half of the files to each of two workers, as far as the halves take as long: what tests of one file share is made once.
dist="--dist worksteal"

current="setting up"
trap 'run_ended $?' EXIT

stage() {
  current=$*
  printf '\n=== %d s: %s ===\n' $SECONDS "$current"
}

run_ended() {
  if [ "$1" -eq 0 ]; then
    printf '\n=== green after %d s ===\n' $SECONDS
  else
    printf '\n=== FAILED (exit %d) after %d s: %s ===\n' "$1" $SECONDS "$current" >&2
  fi
}

show_and_run() {
  printf '$ %s\n' "$*"
  "$@"
}

# fresh_venv DIR PIP_ARGUMENT...
fresh_venv() {
  python -m venv --clear "$1"
  "$1/bin/python" -m pip install "${@:2}"
  "$1/bin/python" -c 'import jax, platform; print("Python", platform.python_version(), "jax", jax.__version__, "in", __import__("sys").prefix)'
}

# readme_command N: the N-th of the two commands in the README's section "Set-up".
readme_command() {
  awk -v want="$1" '
    !block && /^## / { section = ($0 ~ /^## Set-up *$/) }
    section && !block && /^```bash *$/ { block = 1; count++; next }
    block && /^``` *$/ { block = 0; next }
    block && NF { lines[count]++; text[count] = $0 }
    END {
      if (count != 2 || lines[1] != 1 || lines[2] != 1) {
        print "README.md: the section \"## Set-up\" must have two ```bash blocks of one line each" > "/dev/stderr"
        exit 1
      }
      print text[want]
    }' README.md
}

run_readme_command() {
  local command
  command=$(readme_command "$1")
  printf '$ %s\n' "$command"
  bash -euo pipefail -c "$command"
}

check_style_and_types() {
  stage "ruff"
  show_and_run "$tools/ruff" check
  show_and_run "$tools/ruff" format --check
  stage "pyright"
  show_and_run "$tools/pyright" --pythonpath "$tools/python" --warnings
}

# kernels_are PYTHON FORM: what is active in an environment, seen from outside of the source tree.
kernels_are() {
  (cd "$out" && "$1" -P -c '
import sys, jnorm
print(jnorm.__file__, *jnorm.kernels_status())
sys.exit(jnorm.kernels_status().active != sys.argv[1])' "$2")
}

# The native kernels are compiled here, once: what is installed from this tree later finds them in build/.
install_tools() {
  stage "virtual environment for the tools, the examples and the benchmarks"
  fresh_venv .ci/venv -e ".[dev]" "$torch"
  kernels_are "$tools/python" native
  show_and_run "$tools/python" .ci/native_symbols.py build/native-*
}

# build_wheel FOLDER FORM: a wheel, which must be tagged for this platform where it has the native kernels, and for none where not.
build_wheel() {
  show_and_run "$tools/python" -m pip wheel --no-deps --wheel-dir "$out/$1" .
  case "$2 $(basename "$out/$1"/jnorm-*.whl)" in
    "xla "*-py3-none-any.whl) ;;
    *-any.whl | xla*) false ;;
    "native "*-py3-none-*.whl) ;;
    *) false ;;
  esac
  ls "$out/$1"
}

# An installation without a compiler succeeds, and says so.
wheel_without_compiler() {
  stage "a wheel built without a compiler"
  CC=/nonexistent CXX=/nonexistent build_wheel wheel-without-compiler xla
  show_and_run "$oldest/python" -m pip install --no-deps --target "$out/without-compiler" "$out"/wheel-without-compiler/jnorm-*.whl
  PYTHONPATH="$out/without-compiler" kernels_are "$oldest/python" xla
}

# run_driver SANITIZERS STEP: the kernels alone, without Python and XLA, over one in STEP of the driver's cases.
run_driver() {
  local build="$out/native-${1%%,*}"
  cmake -S native -B "$build" -DJNORM_SANITIZE="$1" -DJNORM_WERROR=ON
  cmake --build "$build" --target driver --parallel
  "$build/driver" 0 "$2"
}

run_drivers() {
  stage "the native kernels under AddressSanitizer and UndefinedBehaviorSanitizer, and under ThreadSanitizer"
  local address thread
  run_driver address,undefined "$1" >"$out/native-address.txt" 2>&1 &
  address=$!
  run_driver thread "$2" >"$out/native-thread.txt" 2>&1 &
  thread=$!
  wait "$address" || { tail -n 50 "$out/native-address.txt" && false; }
  wait "$thread" || { tail -n 50 "$out/native-thread.txt" && false; }
  tail -n 1 "$out/native-address.txt" "$out/native-thread.txt"
}

build_docs() {
  stage "the documentation, warnings as errors"
  show_and_run "$tools/sphinx-build" -W --keep-going -n -q -b html docs "$out/docs"
}

# Into the environment of the README's test command: pyright and the other libraries, so that their tests are not skipped.
install_peers() {
  [ -x .venv/bin/python ] || python -m venv .venv
  .venv/bin/python -m pip install "$torch" "$pyright" keras dm-haiku equinox
}

# readme_tests MARKERS: the README's test command as it stands, after install_peers.
readme_tests() {
  stage "the README's test command, newest JAX, with PyTorch, Keras, Haiku and Equinox (-m '$1')"
  PYTEST_ADDOPTS="-m '$1' $dist -rs --durations=15 --junitxml=$out/newest.xml" run_readme_command 2
  .venv/bin/python -c 'import jax, torch; print("tested with jax", jax.__version__, "and torch", torch.__version__)'
  tests_ran "$out/newest.xml" test_torch test_convert test_port_from_torch
}

# tests_ran REPORT FILE...: tests of files whose names begin so were there, and none was skipped.
tests_ran() {
  stage "the tests with other libraries were not skipped"
  "$tools/python" - "$@" <<'PYTHON'
import sys
import xml.etree.ElementTree as ET

report, *files = sys.argv[1:]
cases = {name: [] for name in files}
for case in ET.parse(report).iter("testcase"):
    file = next((part for part in case.get("classname").split(".") if part.startswith("test_")), "")
    for name in files:
        if file.startswith(name):
            cases[name].append(any(s.get("type") != "pytest.xfail" for s in case.iter("skipped")))
print(*(f"{name}: {len(skipped)} tests, {sum(skipped)} skipped" for name, skipped in cases.items()), sep="\n")
sys.exit(any(not skipped or any(skipped) for skipped in cases.values()))
PYTHON
}

# install_oldest EXTRAS: the wheel, with the lower bounds of jax and flax in pyproject.toml.
install_oldest() {
  stage "the wheel, in a virtual environment with the oldest supported JAX, $oldest_jax, and Flax, $oldest_flax"
  build_wheel wheel native
  fresh_venv .ci/venv-oldest "jax==$oldest_jax" "jaxlib==$oldest_jax" "flax==$oldest_flax" "$(echo "$out"/wheel/jnorm-*.whl)[$1]"
  kernels_are "$oldest/python" native
}

# pytest_with PYTHON FORM REPORT PYTEST_ARGUMENT...: what is installed is tested, not the source tree (-P), with one form of the kernels.
pytest_with() {
  JNORM_KERNELS=$2 show_and_run "$1" -P -m pytest -n auto $dist -q -rs --durations=15 "--junitxml=$out/$3.xml" "${@:4}"
}

# oldest_tests FORM PYTEST_ARGUMENT...
oldest_tests() {
  stage "tests with the oldest supported JAX, $oldest_jax, and Flax, $oldest_flax, kernels: $1"
  pytest_with "$oldest/python" "$1" "oldest-$1" "${@:2}"
}

# newest_xla_tests PYTEST_ARGUMENT...
newest_xla_tests() {
  stage "tests with the newest JAX, kernels: xla"
  pytest_with .venv/bin/python xla newest-xla "$@"
}

digits() {
  show_and_run "$tools/python" examples/train_digits.py --checkpoint "$out/digits-checkpoint" "$@"
}

# train_digits ARGUMENT...: a run that must succeed and leave its plot.
train_digits() {
  rm -f "$out/digits.png"
  digits --plot "$out/digits.png" "$@"
  test -s "$out/digits.png"
}

# digits_norms_run: short runs of API MODEL NORM DEVICES on each line of stdin, in one process.
digits_norms_run() {
  show_and_run "$tools/python" .ci/digits_norms.py
}

digits_apis() {
  PYTHONPATH=examples "$tools/python" -c 'from digits_apis import APIS; print(*APIS)'
}

digits_norms() {
  PYTHONPATH=examples "$tools/python" -c 'from digits_models import NORMS; print(*NORMS)'
}

# multihost PROCESSES DEVICES ARGUMENT...: the example in several processes of this machine, its checkpoint tested in one.
multihost() {
  stage "training in $1 processes"
  show_and_run "$tools/python" examples/launch_local.py --timeout 180 --processes "$1" --devices-per-process "$2" \
    examples/train_multihost.py --checkpoint "$out/multihost-checkpoint" "${@:3}"
  show_and_run "$tools/python" examples/train_multihost.py --eval --checkpoint "$out/multihost-checkpoint"
}

# compare_norms ARGUMENT...: all parts must leave their figures and tables.
compare_norms() {
  stage "the comparison of the norms"
  show_and_run "$tools/python" examples/compare_norms.py --out "$out/compare-norms" "$@"
  test "$(ls "$out"/compare-norms/*.png | wc -l)" -eq 6
  test -s "$out/compare-norms/tables.md"
}

# tool_examples ARGUMENT...: what the tools are for, shown on real models.
tool_examples() {
  stage "a model from PyTorch, and a diagnosis"
  show_and_run "$tools/python" examples/port_from_torch.py "$@"
  show_and_run "$tools/python" examples/diagnose.py --plot "$out/diagnosis.png" "$@"
  test -s "$out/diagnosis.png"
}

benchmarks() {
  stage "the benchmark, short"
  show_and_run "$tools/python" -m benchmarks --quick
}
