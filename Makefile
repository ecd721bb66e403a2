# The front door. `make` lists what it can do.

MINUTES ?= 10
SEED ?= 1

.PHONY: help setup build guest demo hosts test conformance bench soak check clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

setup: ## install what is missing (Debian, Ubuntu)
	@scripts/setup

build: setup ## build the binary: target/release/godwit
	cargo build --release -p godwit

guest: setup ## build the test guest: target/guest/
	@guest/build

demo: guest ## watch a VM go from one cluster to another and back; KEEP=1 leaves them up
	cargo build -q --release -p godwit -p e2e --bins
	target/release/demo

hosts: guest ## the same between two hosts without Kubernetes; INJECT=FAULT puts a fault into it
	cargo build -q --release -p godwit -p e2e --bins
	target/release/demo-hosts $(if $(INJECT),--inject $(INJECT))

test: guest ## run all tests, with real QEMU
	cargo test --workspace

conformance: ## the API's tests against another Kubernetes: KUBECONFIG=...
	@scripts/conformance

bench: guest ## measure, side by side with QEMU's own way and libvirt
	@scripts/setup bench
	cargo build -q --release -p godwit -p e2e --bins
	target/release/bench
	target/release/bench-cluster
	target/release/bench-vms
	target/release/bench-moves
	target/release/bench-across

soak: guest ## move with random faults: MINUTES=10 SEED=1; the larger model; kills at every step
	cargo build -q --release -p godwit -p e2e --bins
	target/release/soak --minutes $(MINUTES) --seed $(SEED)
	GODWIT_SOAK=1 cargo test -q --release -p handover --test model -- --nocapture
	GODWIT_SOAK=1 cargo test -q --workspace --test guests -- kills:: kills_across:: --nocapture

check: setup ## format, lints, documentation, licences
	cargo fmt --all --check
	cargo clippy -q --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS=-Dwarnings cargo doc -q --workspace --no-deps
	@if command -v cargo-deny >/dev/null; \
	then cargo deny --log-level error check bans licenses sources; \
	else echo "check: cargo-deny is not installed: dependencies are not checked (cargo install cargo-deny)"; fi

clean: ## remove everything that was built
	cargo clean
