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
    # The versions without their hashes: with hashes, pip would require one for every further package.
    sed -n '/^[a-z]/s/ *\\$//p' "lock/$lock.txt" > constraints.txt
    install --constraint constraints.txt "$@"
fi
/opt/sopdeploy/bin/python no_torch.py
