# Sourced by scripts/run, scripts/test and .ci/run: makes .venv in the repository and keeps it up to date.
#
#   PYTHON               the interpreter to make .venv with; otherwise python3.14 .. python3.11, then python3
#   CORTEXSTREAM_EXTRAS  extras of pyproject.toml to install, comma separated, "" for none; otherwise chosen by machine
#
# shellcheck shell=bash

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$root/.venv"
stamp="$venv/cortexstream.stamp" # three lines: what was installed from, the extras, the extras that could not be
log="$venv/install.log"

say() { printf 'cortexstream: %s\n' "$*" >&2; }

fail() {
  say "$*"
  exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

# Is "$1" a Python that CortexStream runs on? A shim of a version manager may exist and yet not run.
is_good_python() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# Prints the interpreter to make .venv with; nothing if there is none.
find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    is_good_python "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11 or newer that runs; correct it or unset it"
    printf '%s\n' "$PYTHON"
    return
  fi
  for candidate in python3.14 python3.13 python3.12 python3.11 python3; do
    if is_good_python "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
  done
}

make_venv() {
  local python
  python="$(find_python)" || exit 1
  if have uv; then
    say "making .venv with uv"
    uv venv --quiet --clear --python "${python:->=3.11}" "$venv" >&2 || fail "uv could not make $venv"
    return
  fi
  [ -n "$python" ] || fail "no Python 3.11 or newer found (tried python3.14 to python3.11 and python3); install one or set PYTHON"
  "$python" -c 'import ensurepip' 2>/dev/null ||
    fail "$python cannot make virtual environments; install its venv package (on Debian and Ubuntu: apt install python3-venv)"
  say "making .venv with $python ($("$python" --version 2>&1))"
  "$python" -m venv --clear "$venv" >&2 || fail "$python -m venv could not make $venv"
}

# .venv exists and runs after this. A broken one (its Python was removed, the folder was moved) is made anew.
ensure_venv() {
  if [ ! -d "$venv" ] || ! "$venv/bin/python" -c '' >/dev/null 2>&1; then
    make_venv
  elif ! is_good_python "$venv/bin/python"; then
    fail "$venv has $("$venv/bin/python" --version 2>&1), CortexStream needs 3.11 or newer; remove that folder and run this again"
  fi
}

# install ARGUMENTS: pip install into .venv, quietly; what was printed is kept in $log.
install() {
  if have uv; then
    uv pip install --quiet --python "$venv/bin/python" "$@" >>"$log" 2>&1
  else
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" >>"$log" 2>&1
  fi
}

install_package() { install --editable "$root${1:+[$1]}"; }

# A .venv made by uv has no pip, nor has one whose making was interrupted.
ensure_pip() {
  have uv || "$venv/bin/python" -c 'import pip' 2>/dev/null || "$venv/bin/python" -m ensurepip >/dev/null 2>&1 ||
    fail "$venv has no pip and cannot get one; remove that folder and run this again"
}

fail_install() {
  tail -n 15 "$log" >&2
  fail "installation failed; the lines above are the end of $log"
}

# Prints the extra that fits this machine.
machine_extra() {
  case "$(uname -s)-$(uname -m)" in
    Darwin-*) ;; # MLX is a plain dependency on Apple Silicon, and there is none on Intel
    *) if have nvidia-smi && nvidia-smi -L >/dev/null 2>&1; then echo cuda; else echo mlx; fi ;;
  esac
}

# Is every extra in "$1" also in "$2"? Both are comma separated.
covers() {
  local extra
  for extra in ${1//,/ }; do
    case ",$2," in *",$extra,"*) ;; *) return 1 ;; esac
  done
}

# ensure_package EXTRA NEEDED: install cortexstream with EXTRA (if it can be had here) and NEEDED (or fail), unless that
# was done before from the same pyproject.toml in the same place. CORTEXSTREAM_EXTRAS takes EXTRA's place, and must work.
ensure_package() {
  local wanted="$1" needed="$2" optional=yes origin was_origin="" was_installed="" was_missing="" all
  if [ -n "${CORTEXSTREAM_EXTRAS+set}" ]; then
    wanted="${CORTEXSTREAM_EXTRAS// /}" optional=no
    covers "$wanted" mlx,cuda,test || fail "CORTEXSTREAM_EXTRAS=$wanted is unknown; use mlx, cuda, test, or several with commas"
  fi
  origin="$(cksum <"$root/pyproject.toml") $root"
  if [ -f "$stamp" ]; then
    { read -r was_origin && read -r was_installed && read -r was_missing; } <"$stamp" || true
  fi
  if [ "$was_origin" != "$origin" ]; then
    was_installed="" was_missing=""
  elif [ "$optional" = yes ] && [ -n "$was_missing" ] && [ "$was_missing" = "$wanted" ]; then
    wanted="" # tried before
  fi
  all="$wanted${wanted:+${needed:+,}}$needed"
  if [ "$was_origin" = "$origin" ] && covers "$all" "$was_installed"; then
    return
  fi

  say "installing into .venv${all:+, with $all} (once; a few minutes at most on a usual connection)"
  ensure_pip
  : >"$log"
  if ! install_package "$all"; then
    if [ "$optional" = no ] || [ -z "$wanted" ]; then fail_install; fi
    install_package "$needed" || fail_install
    say "the extra \"$wanted\" cannot be installed here (see $log); going on with the reference backend"
    was_missing="$wanted" all="$needed"
  fi
  covers "$was_installed" "$all" || all="$was_installed${all:+,}$all"
  printf '%s\n%s\n%s\n' "$origin" "$all" "$was_missing" >"$stamp"
}
