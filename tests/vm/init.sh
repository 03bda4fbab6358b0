#!/bin/busybox sh
# PID 1 of the guest. From the initramfs: load modules, mount the host's file system, move there.
# From there ("stage2"): make the devices, run the command, report, power off.
# /lab/settings is written by guest.py: functions "shares" and "command_line", variable MTTY.

say() { echo "lab: $*" >/dev/console; }
die() { say "$*"; poweroff -f; reboot -f; }

# share TAG OPTIONS PATH
share() {
    mkdir -p "/host$3"
    mount -t 9p -o "trans=virtio,version=9p2000.L,msize=512000,$2" "$1" "/host$3" ||
        die "cannot mount $3"
}

stage1() {
    /bin/busybox mkdir -p /proc /sys /dev /host
    /bin/busybox --install -s /bin
    export PATH=/bin
    mount -t proc proc /proc
    mount -t sysfs sysfs /sys
    mount -t devtmpfs dev /dev
    for module in /modules/*.ko; do
        [ ! -e "$module" ] || insmod "$module" || die "cannot load $module"
    done
    . /lab/settings
    share root ro,cache=loose /
    mount --move /dev /host/dev
    mkdir -p /host/dev/pts /host/dev/shm
    mount -t devpts -o mode=620,ptmxmode=666 devpts /host/dev/pts
    for folder in /dev/shm /tmp /var/tmp; do
        mount -t tmpfs -o mode=1777 tmpfs "/host$folder"
    done
    mount -t tmpfs -o mode=755 tmpfs /host/run
    mount --move /proc /host/proc
    mount --move /sys /host/sys
    mount -t debugfs debugfs /host/sys/kernel/debug
    shares
    mkdir -p /host/run/lab/bin
    cp /bin/busybox /host/run/lab/bin/
    cp /init /lab/settings /host/run/lab/
    # For who takes the test device's module out, to put it in again.
    for module in /modules/*vfiomig_test.ko; do
        [ ! -e "$module" ] || cp "$module" /host/run/lab/vfiomig_test.ko
    done
    exec switch_root -c /dev/console /host /run/lab/bin/busybox sh /run/lab/init stage2
}

# wait_for TENTHS COMMAND…: until the command succeeds.
wait_for() {
    tenths=$1
    shift
    until "$@" 2>/dev/null; do
        tenths=$((tenths - 1))
        [ "$tenths" -gt 0 ] || return 1
        sleep 0.1
    done
}

copied() { ! kill -0 "$out_pid" && ! kill -0 "$err_pid"; }

stage2() {
    /run/lab/bin/busybox --install -s /run/lab/bin
    export PATH=/run/lab/bin
    . /run/lab/settings
    ip link set lo up
    for device in $MTTY; do
        echo "${device%:*}" >"/sys/class/mdev_bus/mtty/mdev_supported_types/${device#*:}/create" ||
            die "cannot create $device"
    done
    # Ports 1, 2 and 3: standard output, standard error, what became of it.
    wait_for 600 test -e /dev/vport0p3 || die "no virtio ports"
    mkfifo /run/lab/out /run/lab/err
    cat /run/lab/out >/dev/vport0p1 &
    out_pid=$!
    cat /run/lab/err >/dev/vport0p2 &
    err_pid=$!
    exec 3>/dev/vport0p3
    echo started >&3
    (exec 3>&-; command_line) </dev/null >/run/lab/out 2>/run/lab/err
    status=$?
    # Whoever still holds the pipes, a daemon say, does not keep the guest alive.
    wait_for 50 copied
    sync
    echo "exit $status" >&3
    exec 3>&-
    poweroff -f
    reboot -f
}

case "$1" in
    stage2) stage2 ;;
    *) stage1 ;;
esac
