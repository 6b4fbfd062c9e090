#!/bin/sh
# Install the packages of lock/$1.txt, the wheel of this project, and further requirements into /opt/sopdeploy.
set -eu
lock="$1"
shift
install() {
    tools/bin/pip --python /opt/sopdeploy/bin/python install --no-cache-dir "$@"
}
install --require-hashes --requirement "lock/$lock.txt"
install --no-index --no-deps dist/*.whl
if [ "$#" -gt 0 ]; then
    install --constraint "lock/$lock.txt" "$@"
fi
/opt/sopdeploy/bin/python no_torch.py
