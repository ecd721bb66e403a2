# A disk that boots by itself (BIOS, syslinux) and carries the same kernel and
# initramfs. Its layout is fixed, so that a test knows where it may write:
#
#   MiB 0    MBR
#   MiB 1    partition 1: FAT, kernel and initramfs        (31 MiB)
#   MiB 32   partition 2: nothing; for raw writes          (16 MiB)
#   MiB 48   partition 3: ext4 "data", mounted at /data    (the rest)

boot_start=1 raw_start=32 data_start=48

disk_name() { printf 'disk-%s' "$(printf '%s' "$1" | sha256sum | cut -c1-12)"; }
disk_stamp() { printf '%s/.%s.inputs' "$out" "$(disk_name "$1")"; }

disk_inputs() {
  cat "$here/steps/disk.sh" "$here/cmdline" "$kernel/version"
  printf '%s\n' "$1"
  sha256sum "$out/initramfs.img" | cut -d' ' -f1
}

disk_build() {
  local disk=$1 size=$2 new=$1.new
  mkdir -p "$(dirname "$disk")"
  rm -f "$new"
  truncate -s "${size}M" "$new"
  boot_record "$size" >"$out/mbr"
  dd if="$out/mbr" of="$new" conv=notrunc status=none
  rm "$out/mbr"
  boot_partition "$new"
  # No lazy initialisation: an idle guest's disk must be idle.
  mke2fs -q -F -t ext4 -m 0 -L data -O ^resize_inode -J size=4 \
    -E "offset=$((data_start << 20)),lazy_itable_init=0,lazy_journal_init=0,nodiscard" \
    "$new" "$((size - data_start))M"
  fallocate -d "$new"
  mv "$new" "$disk"
}

boot_partition() {
  local image=$1@@${boot_start}M sectors=$(((raw_start - boot_start) * 2048))
  export MTOOLS_SKIP_CHECK=1
  mformat -i "$image" -T "$sectors" -H $((boot_start * 2048)) -h 64 -s 32 -v BOOT ::
  mcopy -i "$image" "$kernel/bzImage" ::/vmlinuz
  mcopy -i "$image" "$out/initramfs.img" ::/
  {
    printf 'DEFAULT guest\nPROMPT 0\nLABEL guest\n  LINUX /vmlinuz\n  INITRD /initramfs.img\n'
    printf '  APPEND %s\n' "$(<"$here/cmdline")"
  } | mcopy -i "$image" - ::/syslinux.cfg
  syslinux --install --offset $((boot_start << 20)) "$1"
}

# The MBR: syslinux's code, then the partition table by hand (CHS is ignored).
boot_record() {
  local code=/usr/lib/syslinux/mbr/mbr.bin
  [[ -r $code ]] || die "$code is missing: run 'make setup' (package syslinux-common)"
  head -c 440 "$code"
  head -c $((446 - $(stat -c %s "$code"))) /dev/zero
  partition 80 0e "$boot_start" "$raw_start"
  partition 00 da "$raw_start" "$data_start"
  partition 00 83 "$data_start" "$1"
  head -c 16 /dev/zero
  printf '\x55\xaa'
}

# partition ACTIVE TYPE FROM TO (MiB)
partition() {
  printf "\\x$1\\xfe\\xff\\xff\\x$2\\xfe\\xff\\xff"
  le32 $(($3 * 2048))
  le32 $((($4 - $3) * 2048))
}

le32() {
  local byte
  for byte in 0 8 16 24; do printf "\\x$(printf %02x $((($1 >> byte) & 255)))"; done
}
