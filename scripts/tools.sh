#!/usr/bin/env bash
# Get the commands that the tests run and pip cannot install: a C++ compiler, which builds the GPU's
# kernel for the CPU; a browser and curl, for the web page and the READMEs; and Prometheus's own
# promtool, for the alerts.
#
#   scripts/tools.sh .venv/bin    promtool goes into this folder, unless it is on PATH
set -euo pipefail
bin=$1

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

# The package lists may be missing or old. Update them once, before the first package.
updated=
update() {
    [ -n "$updated" ] || as_root apt-get update -qq
    updated=yes
}

need() {
    command -v "$1" >/dev/null && return
    echo "Installing $2"
    { update && as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -qq -y --no-install-recommends "$2" >/dev/null; } \
        || { echo "the tests need $1 (Debian: apt-get install $2)" >&2; exit 1; }
}

need c++ g++
need chromium chromium
need curl curl

# Installing Debian's package would start a Prometheus service and enable it at boot, so this only
# unpacks promtool from it.
if ! PATH="$bin:$PATH" command -v promtool >/dev/null; then
    echo "Unpacking promtool"
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    { update && (cd "$folder" && apt-get download -qq -o APT::Sandbox::User=root prometheus >/dev/null \
        && dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x ./usr/bin/promtool) \
        && install "$folder/usr/bin/promtool" "$bin/promtool"; } \
        || { echo "the tests need promtool: put Prometheus's release of it on PATH" >&2; exit 1; }
fi
