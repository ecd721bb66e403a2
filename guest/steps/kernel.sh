# The distribution's own kernel, from its package: nothing is installed, /boot is
# not touched. Leaves in $out/kernel: version, bzImage, modules/.

kernel=$out/kernel

kernel_fetch() (
  [[ -s $kernel/version ]] && exit
  work=$(mktemp -d "$out/kernel.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  if ! kernel_from_packages "$work" && ! kernel_from_boot "$work"; then
    die "no kernel: 'apt-get download' gets none, and no readable one with its modules" \
      "is installed in /boot. Install linux-image-cloud-amd64 (Debian) or" \
      "linux-image-virtual (Ubuntu), or make the package archive reachable"
  fi
  rm -rf "$kernel"
  mv "$work/kernel" "$kernel"
)

# Debian's cloud kernel is the smallest; Ubuntu has none such. The system's package
# lists may be missing or older than the archive: then a private copy of them is
# brought up to date, which needs no root.
kernel_from_packages() {
  local work=$1 options=()
  command -v apt-get >/dev/null || return 1
  kernel_download "$work" && return
  say "kernel: bringing a private copy of the package lists up to date"
  mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
  options=(-o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work/cache"
    -o "APT::Sandbox::User=$(id -un)")
  apt-get -qq "${options[@]}" update </dev/null >&2 && kernel_download "$work" "${options[@]}"
}

# kernel_download WORK [APT'S OPTIONS]
kernel_download() {
  local work=$1 meta image packages deb
  shift
  for meta in linux-image-cloud-amd64 linux-image-virtual linux-image-generic linux-image-amd64; do
    image=$(dependency '^linux-image-[0-9]' "$meta" "$@") || continue
    # Ubuntu has the modules in a package of their own.
    packages=("$image" $(dependency '^linux-modules-[0-9]' "$image" "$@" || true))
    say "kernel: ${packages[*]}"
    rm -rf "$work/x" "$work"/*.deb
    (cd "$work" && apt-get -qq -o "APT::Sandbox::User=$(id -un)" "$@" download "${packages[@]}" \
      </dev/null >&2) || continue
    for deb in "$work"/*.deb; do dpkg-deb -x "$deb" "$work/x"; done
    kernel_collect "$work" "$work/x/boot" "$work/x" && return
  done
  return 1
}

# dependency PATTERN PACKAGE [APT'S OPTIONS]: the first that matches
dependency() {
  local pattern=$1
  shift
  apt-cache "${@:2}" depends --important "$1" 2>/dev/null |
    sed -n 's/^[ |]*Depends: //p' | grep -m1 -E "$pattern"
}

kernel_from_boot() {
  say "kernel: no package, looking in /boot"
  kernel_collect "$1" /boot ""
}

# The newest kernel in folder $2 whose modules are below $3, to $1/kernel.
kernel_collect() {
  local work=$1 boot=$2 prefix=$3 image version tree
  while read -r image; do
    version=${image##*/vmlinuz-}
    for tree in "$prefix/lib/modules/$version" "$prefix/usr/lib/modules/$version"; do
      [[ -r $image && -d $tree/kernel ]] || continue
      mkdir -p "$work/kernel"
      cp "$image" "$work/kernel/bzImage"
      cp -rL "$tree/." "$work/kernel/modules" 2>/dev/null || true
      printf '%s\n' "$version" >"$work/kernel/version"
      return
    done
  done < <(find "$boot" -maxdepth 1 -name 'vmlinuz-*' | sort -rV)
  return 1
}

kernel_inputs() { cat "$here/steps/kernel.sh" "$here/cmdline" "$kernel/version"; }

# For -kernel QEMU gets the unpacked kernel when it has a PVH entry: that saves
# the guest the unpacking, and the memory for it (64 MiB are enough then).
kernel_unpack() {
  local offset length bytes=$kernel/payload setup
  cp "$here/cmdline" "$out/cmdline"
  cp "$kernel/bzImage" "$out/vmlinuz.new"
  # The boot protocol's header: setup_sects, payload_offset, payload_length.
  setup=$(header 497 1)
  offset=$(((setup + 1) * 512 + $(header 584 4)))
  length=$(header 588 4)
  dd if="$kernel/bzImage" of="$bytes" bs=1M iflag=skip_bytes,count_bytes \
    skip="$offset" count="$length" status=none
  if unpacked "$bytes" >"$out/vmlinux.new" && has_pvh_entry "$out/vmlinux.new"; then
    mv "$out/vmlinux.new" "$out/vmlinuz.new"
  else
    say "this kernel has no PVH entry: direct boot needs more memory and time"
  fi
  rm -f "$bytes" "$out/vmlinux.new"
  mv "$out/vmlinuz.new" "$out/vmlinuz"
}

header() { od -An -v -t "u$2" -j "$1" -N "$2" "$kernel/bzImage" | tr -d ' '; }

# The payload ends with its unpacked size (4 bytes), which is no part of the stream:
# the tools write all of it and then complain.
unpacked() {
  case $(od -An -v -t x1 -N 4 "$1" | tr -d ' ') in
    02214c18) head -c -4 "$1" | lz4 -dc ;;
    28b52ffd) head -c -4 "$1" | zstd -dcq ;;
    fd377a58) head -c -4 "$1" | xz -dc ;;
    1f8b*) head -c -4 "$1" | gzip -dc ;;
    *) return 1 ;;
  esac
}

# An ELF note named Xen of type 18 (XEN_ELFNOTE_PHYS32_ENTRY).
has_pvh_entry() {
  grep -qaP '\x04\x00\x00\x00[\x04\x08]\x00\x00\x00\x12\x00\x00\x00Xen\x00' "$1"
}
