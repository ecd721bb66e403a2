# The guest's whole root: busybox, the oracle, the modules it needs, rootfs/.

# Drivers in the order in which to load them; each is preceded by what it needs.
# Those that this kernel has built in, or does not have, are left out.
modules=(virtio_pci virtio_blk virtio_scsi sd_mod virtio_net virtio_balloon ext4 button evdev)
oracle=$out/build/x86_64-unknown-linux-gnu/release/oracle

build_oracle() {
  [[ -x $oracle ]] || say "oracle"
  # Its own target folder: these flags must not throw away the workspace's builds.
  (cd "$root" && CARGO_TARGET_DIR=$out/build RUSTFLAGS='-C target-feature=+crt-static' \
    CARGO_PROFILE_RELEASE_PANIC=abort CARGO_PROFILE_RELEASE_LTO=true \
    CARGO_PROFILE_RELEASE_STRIP=true CARGO_PROFILE_RELEASE_DEBUG=0 \
    cargo build -q --release --target x86_64-unknown-linux-gnu -p oracle --bin oracle)
}

initramfs_inputs() {
  printf '%s\n' "${modules[@]}"
  cat "$here/steps/initramfs.sh" "$kernel/version"
  sha256sum "$oracle" "$(command -v busybox)"
  find "$here/rootfs" -type f -exec sha256sum {} + | sort
}

initramfs_build() (
  tree=$(mktemp -d "$out/initramfs.XXXXXX")
  trap 'rm -rf "$tree"' EXIT
  mkdir -p "$tree"/{bin,sbin,dev,proc,sys,data,tmp,modules}
  cp -r "$here/rootfs/." "$tree"
  cp "$(command -v busybox)" "$oracle" "$tree/bin/"
  ln -s bin/busybox "$tree/init"
  # Hard links: a symbolic one would cost the guest an inode each.
  for name in $("$tree/bin/busybox" --list); do
    [[ -e $tree/bin/$name || -e $tree/sbin/$name ]] || ln "$tree/bin/busybox" "$tree/bin/$name"
  done
  loaded=()
  for name in "${modules[@]}"; do add_module "$name" "$tree/modules"; done
  printf '%s\n' ${loaded[@]+"${loaded[@]}"} >"$tree/modules/order"
  find "$tree" -exec touch -hd @0 {} +
  (cd "$tree" && find . | sort | cpio --quiet -o -H newc -R 0:0 --reproducible) |
    gzip -9n >"$out/initramfs.img.new"
  mv "$out/initramfs.img.new" "$out/initramfs.img"
)

# Copies module $1, after all it depends on, to $2 and appends it to `loaded`. The
# package has no modules.dep (its postinst makes it): each module names its own.
add_module() {
  local name=${1//-/_} to=$2 file need
  [[ -e $to/$name.ko ]] && return
  file=$(find "$kernel/modules/kernel" -regex ".*/${name//_/[-_]}\.ko\(\.xz\|\.zst\|\.gz\)?" -print -quit)
  [[ -n $file ]] || return 0
  case $file in
    *.xz) xz -dc "$file" ;;
    *.zst) zstd -dcq "$file" ;;
    *.gz) gzip -dc "$file" ;;
    *) cat "$file" ;;
  esac >"$to/$name.ko"
  for need in $(module_field "$to/$name.ko" depends) $(module_field "$to/$name.ko" softdep | grep -oP 'pre: \K.*'); do
    add_module "$need" "$to"
  done
  loaded+=("$name.ko")
}

module_field() { tr '\0' '\n' <"$1" | grep -a "^$2=" | cut -d= -f2- | tr ',' ' ' || true; }
