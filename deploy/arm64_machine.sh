#!/bin/bash
# Run a command in a copy of this checkout on an emulated aarch64 machine with Debian's kernel and Python:
#
#     deploy/arm64_machine.sh python3 -m pytest -p no:cacheprovider tests/service/decoding/test_sandbox.py
#
# Needs Debian with cpio, mmdebstrap, pip and qemu-system-arm, 5 GB of memory and 2 GB in TMPDIR. The whole
# system is emulated, because qemu-user has no seccomp filters. The example took 3 minutes with two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root
mkdir "$root"

# Packages are unpacked without their scripts, which this machine could not execute.
mmdebstrap --variant=extract --architectures=arm64 \
    --include=base-files,busybox-static,libgomp1,libstdc++6,linux-image-arm64,python3 trixie - |
    tar -x --exclude='./dev/*' --exclude='./usr/share/doc' --exclude='./usr/lib/modules' -C "$root"
python3 -m pip install --quiet --constraint deploy/lock/dev.txt --no-compile --only-binary=:all: --python-version=3.13 \
    --platform=manylinux_2_28_aarch64 --platform=manylinux2014_aarch64 \
    --target="$root/usr/local/lib/python3.13/dist-packages" ".[cpu]" hypothesis onnx pytest pytest-timeout
mv "$root"/boot/vmlinuz-* "$work/kernel"
git ls-files -z | cpio --null --quiet -pd "$root/checkout"

cat >"$root/init" <<END
#!/usr/bin/busybox sh
export HOME=/root PATH=/usr/bin:/usr/sbin PYTHONPATH=/checkout:/checkout/export:/checkout/service:/checkout/commands:/checkout/plugins/papers
/usr/bin/busybox --install -s /usr/bin
mkdir -p /proc /sys /dev /tmp
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir /dev/shm
mount -t tmpfs shm /dev/shm
ip link set lo up
cd /checkout
${*@Q}
echo "exit code: \$?"
poweroff -f
END
chmod +x "$root/init"
(cd "$root" && find . | cpio --quiet -o -H newc -R 0:0) >"$work/initrd"
rm -rf "$root"
qemu-system-aarch64 -M virt -cpu max,pauth-impdef=on -smp 2 -m 4096 -nographic -nic none -no-reboot \
    -kernel "$work/kernel" -initrd "$work/initrd" -append "console=ttyAMA0 rdinit=/init quiet panic=-1" |
    tee "$work/console"
grep -q '^exit code: 0' "$work/console"
