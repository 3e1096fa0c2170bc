# Everything a user or CI calls. `make demo` and `make test` set up what they need themselves.
.PHONY: demo test simulate bench bench-short lint setup build guests help

# Debian's rustc-web lands in /usr/bin; a newer toolchain in PATH comes first.
CARGO ?= cargo

help:
	@echo 'make demo   a real Debian guest, captured and relaunched as disposables'
	@echo 'make test   all tests'
	@echo 'make simulate   every step of every operation failed and killed, then SEEDS=3000 random ones from FROM=1'
	@echo 'make bench  benches; make bench-short for their short mode'
	@echo 'make lint   clippy with warnings denied, rustfmt'

setup:
	@tools/setup.sh

build: setup
	@$(CARGO) build --release --workspace --bins

guests: build
	@fixtures/build-all.sh target

demo: build
	@fixtures/build-all.sh target debian
	@tools/without-swap.sh fixtures/demo.sh

test: guests
	@tools/without-swap.sh $(CARGO) test --release --workspace

FROM ?= 1
SEEDS ?= 3000
simulate: setup
	@$(CARGO) build --release -q -p simulator
	@target/release/dispvm-simulator sweep --every --from $(FROM)
	@target/release/dispvm-simulator sweep --from $(FROM) --count $(SEEDS)

bench: guests
	@tools/without-swap.sh $(CARGO) run --release -q -p benches --bin launch-bench -- --full

bench-short: guests
	@tools/without-swap.sh $(CARGO) run --release -q -p benches --bin launch-bench -- --short

lint: setup
	@$(CARGO) clippy --release --workspace --all-targets -- -D warnings
	@$(CARGO) fmt --all -- --check
