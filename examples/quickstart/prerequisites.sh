#!/usr/bin/env bash
# Says in one clear line per tool what is missing and how to get it; installs redis-server where it may.
set -u
missing=0

say_missing() { printf 'missing: %s; get it with: %s\n' "$1" "$2" >&2; missing=1; }

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
  say_missing "Python 3.11 or 3.12 ($python is $("$python" --version 2>/dev/null || echo absent))" \
    "apt-get install python3.11 python3.11-venv, or pyenv install 3.11; then make PYTHON=python3.11 ..."
elif ! "$python" -c 'import ensurepip' 2>/dev/null && ! command -v uv >/dev/null; then
  say_missing "venv and pip of $python, to install uv with" "apt-get install python3-venv"
fi

java_major=$(java -version 2>&1 | sed -n 's/.*version "\([0-9]*\).*/\1/p' | head -1)
[ "${java_major:-0}" -ge 17 ] || say_missing "Java 17 or newer (found: ${java_major:-none})" "apt-get install openjdk-17-jre-headless"

command -v mvn >/dev/null || say_missing "Maven (mvn)" "apt-get install maven"

if ! command -v redis-server >/dev/null; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing redis-server with apt-get" >&2
    (apt-get install -y -q redis-server || { apt-get update -q && apt-get install -y -q redis-server; }) >&2 ||
      say_missing "redis-server" "apt-get install redis-server"
  elif sudo -n true 2>/dev/null; then
    (sudo apt-get update -q && sudo apt-get install -y -q redis-server) >&2 ||
      say_missing "redis-server" "sudo apt-get install redis-server"
  else
    say_missing "redis-server" "sudo apt-get install redis-server"
  fi
fi
exit $missing
