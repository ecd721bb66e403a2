# One host of the pair: PID 1 of namespaces of its own (mounts, host name,
# processes). It ends, and with it all that it started, when its standard input
# is closed or libvirtd ends.
#
#   host.sh DIR HOSTNAME
set -eu
dir=$1
exec 3<&0

hostname "$2"
for place in /run /var/lib /var/log /var/cache /etc/libvirt /etc/passwd /etc/group; do
  mount --bind "$dir$place" "$place"
done

cat <&3 >/dev/null &
held=$!
{
  libvirtd || echo "libvirtd ended with status $?"
  kill "$held"
} </dev/null >"$dir/libvirtd.log" 2>&1 3<&- &

# Reaps orphans too: libvirt takes a QEMU that is a zombie for one that runs.
exec 2>/dev/null
wait "$held"
