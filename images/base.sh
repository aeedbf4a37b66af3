#!/bin/sh
# A base image where no image registry can be reached: Debian with Python, from this machine's own package sources.
# Needs root, mmdebstrap and podman.   images/base.sh [NAME]
set -eu
name=${1:-localhost/rlaifv-base:dev}
. /etc/os-release
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates,tini \
  "$VERSION_CODENAME" "$work/root.tar" /etc/apt/sources.list.d/debian.sources
podman import --quiet --change 'CMD ["python3"]' "$work/root.tar" "$name"
