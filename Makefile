# Everything a user or CI calls. `make demo` and `make test` set up what they need themselves.
.PHONY: demo test fuzz soak simulate rows bench bench-short qrexec-bench lint setup build guests dom0 xen-test xen-soak man install help

# Debian's rustc-web lands in /usr/bin; a newer toolchain in PATH comes first.
CARGO ?= cargo
PREFIX ?= /usr/local
# Of `make fuzz`, all targets together.
FUZZ_SECONDS ?= 600

help:
	@echo 'make demo   a real Debian guest, captured and relaunched as disposables'
	@echo 'make test   all tests, and every fuzz target for two seconds or more'
	@echo 'make fuzz   every fuzz target, FUZZ_SECONDS=$(FUZZ_SECONDS) in all'
	@echo 'make soak   1,000 launches, 16 in flight, some killed at random instants'
	@echo 'make xen-test  the tests on a real Xen host alone, under software emulation; make xen-soak for its launches'
	@echo 'make simulate   every step of every operation failed and killed, then SEEDS=3000 random ones from FROM=1'
	@echo 'make rows   the rows of Qubes behaviour with the tests that prove them, run now, into docs/rows.md'
	@echo 'make bench  benches; make bench-short for their short mode'
	@echo 'make qrexec-bench  those of calls between qubes alone'
	@echo 'make dom0   the static binaries for a dom0, into target/dom0'
	@echo 'make man    manual pages and shell completions, into target/share'
	@echo 'make install  binaries, manual pages and completions, below PREFIX ($(PREFIX))'
	@echo 'make lint   clippy with warnings denied, rustfmt'

setup:
	@tools/setup.sh

build: setup
	@$(CARGO) build --release --workspace --bins

guests: build dom0
	@fixtures/build-all.sh target

dom0: build
	@tools/dom0.sh target/release target/dom0

demo: build
	@fixtures/build-all.sh target debian
	@tools/without-swap.sh fixtures/demo.sh

test: guests
	@tools/without-swap.sh $(CARGO) test --release --workspace
	@tools/fuzz.sh all 24

# Cargo's --test takes patterns: one file for each part of it.
xen-test: build dom0
	@fixtures/build-all.sh target test qemu7 xen
	@$(CARGO) test --release -p fixtures --test 'xen_*' --no-fail-fast

fuzz: setup
	@tools/fuzz.sh all $(FUZZ_SECONDS)

soak: guests
	@tools/without-swap.sh $(CARGO) run --release -q -p fixtures --bin soak -- 1000

xen-soak: build dom0
	@fixtures/build-all.sh target test qemu7 xen
	@$(CARGO) run --release -q -p fixtures --bin xen-soak

FROM ?= 1
SEEDS ?= 3000
simulate: setup
	@$(CARGO) build --release -q -p simulator
	@target/release/dispvm-simulator sweep --every --from $(FROM)
	@target/release/dispvm-simulator sweep --from $(FROM) --count $(SEEDS)

rows: guests
	@tools/without-swap.sh tools/rows.sh > target/rows.md; status=$$?; cp target/rows.md docs/rows.md; cat docs/rows.md; exit $$status

bench: guests
	@tools/without-swap.sh $(CARGO) run --release -q -p benches --bin launch-bench -- --full
	@tools/without-swap.sh $(CARGO) run --release -q -p benches --bin spare-bench -- --full
	@tools/without-swap.sh $(CARGO) run --release -q -p benches --bin cold-cache-bench -- --full
	@tools/without-swap.sh $(CARGO) run --release -q -p benches --bin qrexec-bench -- --full
	@$(CARGO) run --release -q -p benches --bin xen-bench -- --full
	@tools/encode-bench.sh

bench-short: guests
	@tools/without-swap.sh $(CARGO) run --release -q -p benches --bin launch-bench -- --short
	@tools/without-swap.sh $(CARGO) run --release -q -p benches --bin spare-bench -- --short
	@tools/without-swap.sh $(CARGO) run --release -q -p benches --bin cold-cache-bench -- --short
	@tools/without-swap.sh $(CARGO) run --release -q -p benches --bin qrexec-bench -- --short
	@$(CARGO) run --release -q -p benches --bin xen-bench -- --short

qrexec-bench: guests
	@tools/without-swap.sh $(CARGO) run --release -q -p benches --bin qrexec-bench -- --full

man: build
	@tools/man.sh target/release target/share

install: man
	@install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/share
	@install -m 755 $(addprefix target/release/,dispvm-launch dispvm-savefile dispvm-qube dispvmd qvm qrexec-policy qrexec-client qrexec-policy-exec) $(DESTDIR)$(PREFIX)/bin
	@for tool in $$(target/release/qvm 2>&1 | sed -n 's/^tools: //p' | tr -d ,); do ln -sf qvm $(DESTDIR)$(PREFIX)/bin/$$tool; done
	@cp -r target/share/. $(DESTDIR)$(PREFIX)/share
	@tools/install-qubes.sh "$(DESTDIR)" "$(PREFIX)"
	@install -d $(DESTDIR)$(PREFIX)/lib/systemd/system
	@sed 's|/usr/local|$(PREFIX)|' control-plane/dispvmd.service > $(DESTDIR)$(PREFIX)/lib/systemd/system/dispvmd.service
	@install -m 644 control-plane/dispvmd.socket $(DESTDIR)$(PREFIX)/lib/systemd/system
	@install -D -m 644 control-plane/dispvmd.sysusers $(DESTDIR)$(PREFIX)/lib/sysusers.d/dispvmd.conf

lint: setup
	@$(CARGO) clippy --release --workspace --all-targets -- -D warnings
	@$(CARGO) fmt --all -- --check
